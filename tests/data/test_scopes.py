"""``adapter.route_on``: which tokens of a chat the routers read, and conversations that are one example."""

import dataclasses

import numpy as np
import pytest

from milora_jax.adapters.registry import build_method
from milora_jax.config import AdapterSection, Config, DataSection
from milora_jax.data.batches import collate, collate_prompts
from milora_jax.data.chat import Message, encode_chat, render_chat
from milora_jax.data.conversations import read_answers
from milora_jax.data.packing import Rows
from milora_jax.data.records import Record
from milora_jax.data.scopes import EncodedPrompt, RouteScopeError, encode_messages, whole_prompt
from milora_jax.data.tokens import (
    encode_conversation,
    encode_example,
    encode_question,
    encode_records,
    token_fingerprint,
)
from milora_jax.errors import UserError
from milora_jax.prompt_format import PromptFormat
from tests.data.chats import CHATML, ENDS, TEMPLATES, chat_tokenizer
from tests.models import TINY

PICKY = "{% if messages|length == 1 %}{{ raise_exception('too short') }}{% endif %}" + CHATML
"""Writes no chat of one message."""

WHOLE, FIRST, SYSTEM = (PromptFormat("chat", route_on=part) for part in ("prompt", "first_turn", "system"))
BRIEF = Message("system", "Be brief.")
TALK = [
    Message("user", "What is 1 + 1?"),
    Message("assistant", "The answer is 2."),
    Message("user", " and 2 + 2? "),
    Message("assistant", "It is 4."),
    Message("user", "Why?"),
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {
        name: chat_tokenizer(tmp_path_factory.mktemp(name), template)
        for name, template in {**TEMPLATES, "picky": PICKY}.items()
    }


def end_of(tokenizer, name):
    return tokenizer.convert_tokens_to_ids(ENDS.get(name, "<|im_end|>"))


def turns(messages, where="rows.jsonl:1"):
    """The records of a chat's answers."""
    row = {"messages": [dataclasses.asdict(message) for message in messages]}
    return [
        Record(before[-1].content, "", turn.content, turn.content, before, where=where)
        for before, turn in read_answers(row, where)
    ]


@pytest.mark.parametrize("name", ["llama3", "gemma", "chatml", "mistral", "thinking"])
def test_the_first_turn_is_the_same_at_every_turn(tokenizers, name):
    tokenizer = tokenizers[name]
    begun = [] if name in ("gemma", "mistral") else [BRIEF]
    head = render_chat(tokenizer, [*begun, TALK[0]], add_generation_prompt=False)
    for count in (1, 3, 5):
        messages = [*begun, *TALK[:count]]
        prompt = encode_messages(tokenizer, messages, FIRST)
        assert (
            prompt.ids == encode_chat(tokenizer, messages) == encode_messages(tokenizer, messages, WHOLE).ids
        )
        assert tokenizer.decode(prompt.routed) == head
        assert encode_messages(tokenizer, messages, WHOLE).route_tokens == 0
        assert prompt.routed == prompt.ids[: prompt.route_tokens]
    assert len(head) < len(render_chat(tokenizer, messages))


@pytest.mark.parametrize("name", ["llama3", "chatml", "thinking"])
def test_the_system_message_alone(tokenizers, name):
    tokenizer = tokenizers[name]
    for count in (1, 3):
        prompt = encode_messages(tokenizer, [BRIEF, *TALK[:count]], SYSTEM)
        assert tokenizer.decode(prompt.routed) == render_chat(tokenizer, [BRIEF], add_generation_prompt=False)


@pytest.mark.parametrize(
    ("name", "messages", "written", "message"),
    [
        ("llama3", TALK, SYSTEM, "the chat has no system message"),
        ("picky", [BRIEF, *TALK], SYSTEM, "route_on is 'system': the chat template cannot write"),
        ("mistral", [BRIEF, *TALK], SYSTEM, "does not begin a chat with the system message"),
        ("mistral", [BRIEF, *TALK], FIRST, "does not begin a chat with the first turn"),
        ("llama3", [BRIEF], FIRST, "the chat has no message of a user"),
    ],
)
def test_what_no_template_gives_is_refused_in_one_line(tokenizers, name, messages, written, message):
    with pytest.raises(RouteScopeError, match=message) as caught:
        encode_messages(tokenizers[name], messages, written)
    assert "\n" not in str(caught.value)


def test_what_is_no_chat_is_one_turn_and_has_no_system_message(tokenizers):
    tokenizer, plain = tokenizers["llama3"], Record("Add.", "1 2", "3", "3")
    alpaca = PromptFormat(route_on="first_turn")
    assert encode_question(tokenizer, plain, alpaca) == encode_question(tokenizer, plain, PromptFormat())
    assert whole_prompt([5, 6], FIRST) == EncodedPrompt([5, 6], 0)
    assert whole_prompt([5, 6], FIRST).routed == [5, 6]
    with pytest.raises(RouteScopeError, match="no chat"):
        whole_prompt([5, 6], SYSTEM)
    with pytest.raises(UserError, match=r"data\.template is 'alpaca'"):
        PromptFormat(route_on="system")
    with pytest.raises(RouteScopeError, match="no system message"):
        encode_question(tokenizer, plain, SYSTEM)
    assert encode_question(tokenizer, plain, FIRST).route_tokens > 0, "an instruction is a user's message"


def test_the_setting_is_of_methods_with_a_router():
    for method in ("milora", "midora"):
        assert build_method(AdapterSection(method=method, route_on="system")).route_scope == "system"
        assert build_method(AdapterSection(method=method)).route_scope == "prompt"
    with pytest.raises(
        UserError, match=r"adapter\.route_on is 'system', but method 'lora' has no such setting"
    ):
        build_method(AdapterSection(method="lora", route_on="system"))
    with pytest.raises(UserError, match=r"adapter\.route_on is 'turn'"):
        build_method(AdapterSection(route_on="turn"))
    config = Config(adapter=AdapterSection(route_on="system"))
    with pytest.raises(UserError, match=r"expected data\.template=chat"):
        _ = config.prompt_format
    assert dataclasses.replace(config, data=DataSection(template="chat")).prompt_format == SYSTEM


@pytest.mark.parametrize("name", ["gemma", "chatml", "mistral"])
def test_a_conversation_is_the_tokens_of_its_turns(tokenizers, name):
    tokenizer = tokenizers[name]
    end = end_of(tokenizer, name)
    records = turns([*TALK, Message("assistant", "Because.")])
    alone = [encode_example(tokenizer, record, [end], 10**6, FIRST) for record in records]
    example, fitting = encode_conversation(tokenizer, records, [end], 10**6, FIRST)
    assert fitting == 3
    np.testing.assert_array_equal(example.tokens, alone[-1].tokens)
    assert example.routed == alone[0].routed == alone[-1].routed
    assert example.prompt_length == alone[0].prompt_length
    for (start, stop), turn in zip(example.learned, alone, strict=True):
        np.testing.assert_array_equal(example.tokens[start:stop], turn.tokens[turn.prompt_length :])
        assert example.tokens[stop - 1] == end
    whole = [encode_example(tokenizer, record, [end], 10**6, WHOLE) for record in records]
    assert sum(len(each.tokens) for each in whole) == sum(len(each.tokens) for each in alone)


def test_ten_turns_take_less_than_a_third_of_the_tokens(tokenizers):
    tokenizer = tokenizers["chatml"]
    messages = [BRIEF]
    for i in range(10):
        said = f"What is {i} + {i}, and why is the answer {2 * i}?"
        messages += [
            Message("user", said),
            Message("assistant", f"The answer is {2 * i}, as {i} is there twice."),
        ]
    model = dataclasses.replace(TINY, vocab_size=len(tokenizer), eos_ids=(end_of(tokenizer, "chatml"),))
    found = {}
    for written in (WHOLE, FIRST, SYSTEM):
        examples, dropped = encode_records(tokenizer, turns(messages), model, 10**6, written)
        assert dropped == 0
        found[written.route_on] = (len(examples), sum(len(example.tokens) for example in examples))
    assert [found[name][0] for name in ("prompt", "first_turn", "system")] == [10, 1, 1]
    assert found["first_turn"][1] == found["system"][1] < found["prompt"][1] / 3
    learned = {
        written.route_on: sum(
            stop - start
            for example in encode_records(tokenizer, turns(messages), model, 10**6, written)[0]
            for start, stop in example.learned
        )
        for written in (WHOLE, FIRST)
    }
    assert learned["first_turn"] == learned["prompt"], "the same answers are learned"


def test_turns_that_do_not_fit_are_left_out_and_counted(tokenizers):
    tokenizer = tokenizers["chatml"]
    end = end_of(tokenizer, "chatml")
    model = dataclasses.replace(TINY, vocab_size=len(tokenizer), eos_ids=(end,))
    records = turns([*TALK, Message("assistant", "Because.")])
    lengths = [len(encode_example(tokenizer, record, [end], 10**6, FIRST).tokens) for record in records]
    for limit, kept in ((lengths[2], 3), (lengths[2] - 1, 2), (lengths[0], 1)):
        (example,), dropped = encode_records(tokenizer, records, model, limit, FIRST)
        assert (len(example.learned), dropped) == (kept, 3 - kept)
        assert len(example.tokens) == lengths[kept - 1]
        assert len(encode_records(tokenizer, records, model, limit, WHOLE)[0]) == kept, "as by themselves"
    with pytest.raises(UserError, match=r"longer than data\.max_length"):
        encode_records(tokenizer, records, model, lengths[0] - 1, FIRST)


def test_an_answer_without_weight_is_history(tokenizers):
    tokenizer = tokenizers["chatml"]
    end = end_of(tokenizer, "chatml")
    messages = [*TALK, Message("assistant", "Because.")]
    values = [dataclasses.asdict(message) for message in messages]
    values[3]["weight"] = 0
    read = read_answers({"messages": values}, "rows.jsonl:1")
    records = [
        Record(before[-1].content, "", turn.content, turn.content, before, where="rows.jsonl:1")
        for before, turn in read
    ]
    example, fitting = encode_conversation(tokenizer, records, [end], 10**6, FIRST)
    assert fitting == 2
    said = [tokenizer.decode(example.tokens[start:stop]) for start, stop in example.learned]
    assert said == ["The answer is 2.<|im_end|>", "Because.<|im_end|>"]
    assert "It is 4." in tokenizer.decode(example.tokens)


def test_rows_are_not_joined(tokenizers):
    """The second row goes on from the first, and is another row all the same."""
    tokenizer = tokenizers["chatml"]
    model = dataclasses.replace(TINY, vocab_size=len(tokenizer), eos_ids=(end_of(tokenizer, "chatml"),))
    longer = turns(TALK[:4], where="rows.jsonl:2")[1:]
    examples, _ = encode_records(tokenizer, [*turns(TALK[:2]), *longer], model, 10**6, FIRST)
    assert len(examples) == 2


def test_a_template_that_rewrites_history_is_refused_with_its_message(tokenizers):
    tokenizer = tokenizers["thinking"]
    end = end_of(tokenizer, "thinking")
    talk = [Message("user", "1 + 1?"), Message("assistant", "it is two</think>2"), Message("user", "Why?")]
    records = turns([BRIEF, *talk, Message("assistant", "so</think>it is.")])
    with pytest.raises(
        RouteScopeError, match=r"rows\.jsonl:1: message 3, or what comes before it, has other"
    ):
        encode_conversation(tokenizer, records, [end], 10**6, FIRST)
    chatml = tokenizers["chatml"]
    with pytest.raises(RouteScopeError, match="ends message 2 with no token that ends an answer"):
        encode_conversation(chatml, turns(TALK[:4]), [2], 10**6, FIRST)
    merges = tokenizers["llama3"]  # its line breaks and the word behind them become one token
    with pytest.raises(RouteScopeError, match="by the chat template or the tokenizer"):
        encode_conversation(merges, turns(TALK[:4]), [end_of(merges, "llama3")], 10**6, FIRST)
    example, fitting = encode_conversation(tokenizer, records[:1], [end], 10**6, FIRST)
    assert fitting == 1, "one turn has no history"
    assert not example.answers


@pytest.mark.thorough
def test_masks_are_of_the_scope_and_of_every_answer(tokenizers):
    tokenizer = tokenizers["chatml"]
    end = end_of(tokenizer, "chatml")
    talks = [[BRIEF, *TALK, Message("assistant", "Because.")], [BRIEF, *TALK[:2]]]
    examples = [encode_conversation(tokenizer, turns(talk), [end], 10**6, FIRST)[0] for talk in talks]
    (row,) = Rows(examples, 10**6)
    length = sum(len(example.tokens) for example in examples)
    packed = collate([row], length, 1, prompts=2)
    start = 0
    for number, example in enumerate(row, 1):
        alone, here = collate([[example]], length, 1), slice(start, start + len(example.tokens))
        for field in ("tokens", "positions", "prompt_mask", "loss_mask"):
            of_row = getattr(packed, field)[0][here]
            np.testing.assert_array_equal(of_row, getattr(alone, field)[0][: len(example.tokens)])
        assert (packed.segment_ids[0][here] == number).all()
        assert alone.prompt_mask.sum() == example.route_tokens
        assert alone.loss_mask.sum() == sum(stop - first for first, stop in example.learned)
        start += len(example.tokens)
    prompts = [[5, 6, 7], [8, 9]]
    scoped = collate_prompts(prompts, 4, 0, 3, route_tokens=[2, 0]).prompt_mask
    np.testing.assert_array_equal(scoped, [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]])


def test_one_turn_differs_by_the_generation_prompt_alone(tokenizers):
    for name, differs in (("mistral", False), ("llama3", True)):
        tokenizer = tokenizers[name]
        (record,) = turns(TALK[:2])
        ends = [end_of(tokenizer, name)]
        whole, first = (encode_example(tokenizer, record, ends, 10**6, each) for each in (WHOLE, FIRST))
        length = len(whole.tokens)
        one, other = collate([[whole]], length, 1), collate([[first]], length, 1)
        for field in ("tokens", "segment_ids", "positions", "loss_mask"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
        assert (one.prompt_mask != other.prompt_mask).any() == differs


def test_the_fingerprint_of_tokens_tells_scopes_apart(tokenizers):
    tokenizer = tokenizers["llama3"]
    (record,) = turns([BRIEF, *TALK[:2]])
    ends = [end_of(tokenizer, "llama3")]
    prints = {
        token_fingerprint([encode_example(tokenizer, record, ends, 99, w)]) for w in (WHOLE, FIRST, SYSTEM)
    }
    assert len(prints) == 3
