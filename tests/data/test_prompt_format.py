"""Prompts are those that a model was trained on: its tokenizer's own rule, one time, thoughts opened once."""

import dataclasses
from datetime import datetime

import pytest

from milora_jax.data.chat import Message, encode_chat, encode_exchange, render_chat
from milora_jax.data.records import Record
from milora_jax.data.tokens import (
    encode_example,
    encode_prompt,
    encode_question,
    encode_records,
    load_tokenizer,
    require_embedded,
    token_fingerprint,
)
from milora_jax.errors import UserError
from milora_jax.prompt_format import UNSTORED, PromptFormat, stored_prompt_format
from tests.data.chats import CHATML, THINKING, chat_tokenizer
from tests.models import WITH_TOKENIZER, write_tokenizer

TEXT = "The capital of France is"
RULES = {"nothing": "$A", "begins": "<s> $A", "ends": "$A </s>", "both": "<s> $A </s>"}
MODEL = dataclasses.replace(WITH_TOKENIZER, eos_ids=(2,))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """One for each rule of what is put around a text, read back from its files."""
    from tokenizers.processors import TemplateProcessing

    found = {}
    for name, rule in RULES.items():
        folder = tmp_path_factory.mktemp(name)
        write_tokenizer(folder, 320)
        tokenizer = load_tokenizer(str(folder))
        tokenizer._tokenizer.post_processor = TemplateProcessing(
            single=rule, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        tokenizer.save_pretrained(folder)
        found[name] = load_tokenizer(str(folder))
    return found


@pytest.mark.parametrize("name", RULES)
def test_a_prompt_has_the_ids_of_the_tokenizer_itself(tokenizers, name):
    tokenizer = tokenizers[name]
    assert encode_prompt(tokenizer, TEXT) == tokenizer(TEXT).input_ids
    written = f"{TEXT}</s><pad> <s>and"
    assert encode_prompt(tokenizer, written, parse_special_tokens=True) == tokenizer(written).input_ids
    around = set(tokenizer("x").input_ids) & {1, 2, 3}
    assert {1, 2, 3} & set(encode_prompt(tokenizer, written)) == around


@pytest.mark.parametrize("name", RULES)
def test_the_rule_can_be_another(tokenizers, name):
    tokenizer = tokenizers[name]
    bare = tokenizer(TEXT, add_special_tokens=False).input_ids
    assert encode_prompt(tokenizer, TEXT, "none") == bare
    assert encode_prompt(tokenizer, TEXT, "bos") == [1, *bare]
    record = Record(TEXT, "", "Paris", "Paris")
    for rule in ("tokenizer", "bos", "none"):
        written = PromptFormat(special_tokens=rule)
        prompt = encode_question(tokenizer, record, written).ids
        example = encode_example(tokenizer, record, [2], 500, written)
        assert example.tokens[: example.prompt_length].tolist() == prompt
        assert tokenizer.decode(example.tokens[example.prompt_length :]) == "Paris</s>"


@pytest.mark.parametrize("rule", ["tokenizer", "bos", "none"])
def test_a_beginning_that_the_caller_has_written_is_not_doubled(tokenizers, rule):
    ids = encode_prompt(tokenizers["begins"], f"<s>{TEXT}", rule, parse_special_tokens=True)
    assert ids == [1, *encode_prompt(tokenizers["begins"], TEXT, "none")]


def test_a_tokenizer_without_a_beginning_has_none_to_put(tokenizers):
    tokenizer = tokenizers["nothing"]
    tokenizer.bos_token = None
    try:
        assert encode_prompt(tokenizer, TEXT, "bos") == tokenizer(TEXT).input_ids
        assert encode_prompt(tokenizer, f"<s>{TEXT}", parse_special_tokens=True)[0] == 1
    finally:
        tokenizer.bos_token = "<s>"


def test_chats_may_be_mappings(tmp_path):
    tokenizer = chat_tokenizer(tmp_path, CHATML)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi.", "name": None}]
    messages = [Message("system", "Be brief."), Message("user", "Hi.")]
    assert encode_chat(tokenizer, chat) == encode_chat(tokenizer, messages)
    assert render_chat(tokenizer, chat) == render_chat(tokenizer, messages)
    assert encode_exchange(tokenizer, chat, "Yes.", [2]) == encode_exchange(tokenizer, messages, "Yes.", [2])


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([{"content": "x"}], "the role of message 1 is ''"),
        ([{"role": "tool", "content": "x"}], "the role of message 1 is 'tool'"),
        ([{"role": "user"}], "message 1 has no content"),
        ([{"role": "user", "content": None}], "the content of message 1 is of type NoneType: expected text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "the content of message 1 is of type list"),
        ([{"role": "user", "content": "x", "tool_calls": [1]}], "message 1 has a field 'tool_calls'"),
        ([], "the chat is empty"),
    ],
)
def test_a_mapping_that_is_no_message_is_refused_by_name(tmp_path, chat, message):
    with pytest.raises(UserError) as caught:
        encode_chat(chat_tokenizer(tmp_path, CHATML), chat)
    assert message in str(caught.value)


DATED = {
    "variable": "{%- set day = '%-d %B, 100%% %d' %}{{ strftime_now(day) }}\n",
    "asked first": "{%- if strftime_now is defined %}{{ strftime_now('%A %H:%M:%S') }}{% endif %}\n",
    "white space": "\n  \n  {% if true %} {{ strftime_now('%d %b %Y') }}\n  {% endif %}\n",
    "in a macro": "{% macro day() %}{{ strftime_now('%Y-%m-%d') }}{% endmacro %}{{ day() }}",
    "in a loop": "  {%- for m in messages %}{{ strftime_now('%y')|int + 1 }}{% endfor %}",
}


@pytest.mark.parametrize("name", DATED)
def test_a_template_is_told_the_time_of_the_run(tmp_path, monkeypatch, name):
    """As transformers writes it at that time."""
    from transformers.utils import chat_template_utils

    tokenizer = chat_tokenizer(tmp_path, DATED[name] + CHATML)
    chat = [Message("user", "x")]
    times = ("2024-07-06T01:02:03", "2025-08-27")
    for time in times:

        class Then(datetime):
            @classmethod
            def now(cls, tz=None, time=time):
                return datetime.fromisoformat(time)

        monkeypatch.setattr(chat_template_utils, "datetime", Then)
        expected = tokenizer.apply_chat_template(
            [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
        )
        monkeypatch.undo()
        assert render_chat(tokenizer, chat, time=time) == expected
    prints = []
    for time in (times[0], times[1], times[0]):
        written = PromptFormat("chat", time=time)
        example = encode_example(tokenizer, Record("x", "", "y", "y"), [2], 500, written)
        assert example.tokens[: example.prompt_length].tolist() == encode_chat(tokenizer, chat, time=time)
        prints.append(token_fingerprint([example]))
    assert prints[0] == prints[2] != prints[1]


class TestThoughts:
    """A template that opens a thought in its generation prompt."""

    @pytest.fixture
    def tokenizer(self, tmp_path):
        return chat_tokenizer(tmp_path, THINKING)

    @pytest.mark.parametrize(
        "content",
        [
            "<think>\ntwo two</think>\n\n4",
            "two two</think>\n\n4",
            "<think>two two</think>\n\n4",
            "\n<think>\ntwo two</think>\n\n4",
        ],
    )
    def test_it_is_opened_once(self, tokenizer, content):
        before, turn = encode_exchange(tokenizer, [Message("user", "2 + 2?")], content, [2])
        opening, closing = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
        assert [*before, *turn].count(opening) == turn.count(closing) == 1
        assert tokenizer.decode(turn[:-1]) == "two two</think>\n\n4"

    @pytest.mark.parametrize("content", ["6", "<think>6", "<think>\n6\n"])
    def test_an_answer_that_stays_in_it_is_refused_with_its_row(self, tokenizer, content):
        record = Record("3 + 3?", "", content, content, where="rows.jsonl:7")
        with pytest.raises(UserError, match=r"rows\.jsonl:7: the chat template opens a thought \(<think>\)"):
            encode_records(tokenizer, [record], MODEL, 500, PromptFormat("chat"))

    def test_a_history_that_keeps_it_opens_it_once(self, tmp_path):
        """The template writes what the turn holds: the thought goes on from the prompt's."""
        kept = THINKING.replace("message.content.split('</think>')[-1]", "message.content")
        for place, content in enumerate(("<think>\nwhy</think>4", "why</think>4")):
            tokenizer = chat_tokenizer(tmp_path / str(place), kept)
            before, turn = encode_exchange(tokenizer, [Message("user", "2 + 2?")], content, [2])
            (opening,) = tokenizer.convert_tokens_to_ids(["<think>"])
            assert [*before, *turn].count(opening) == 1
            assert tokenizer.decode(turn).startswith("why</think>4")

    def test_a_question_about_the_tag_opens_nothing(self, tmp_path):
        tokenizer = chat_tokenizer(tmp_path, "{% for m in messages %}{{ m.content }}{% endfor %}")
        before, turn = encode_exchange(tokenizer, [Message("user", "What is <think>")], "A tag.", [2])
        assert tokenizer.decode([*before, *turn]) == "What is <think>A tag.</s>"


class TestEmbeddings:
    """Ids are looked at, not how many tokens there are."""

    def test_a_token_beyond_the_embedding_is_named_with_its_row(self, tokenizers, tmp_path):
        tokenizer = load_tokenizer(tokenizers["nothing"].name_or_path)
        tokenizer.add_tokens(["<far>"])
        at = tokenizer.convert_tokens_to_ids("<far>")
        records = [Record("a", "", "b", "b"), Record("a <far>", "", "b", "b", where="rows.jsonl:2")]
        small = dataclasses.replace(MODEL, vocab_size=at)
        with pytest.raises(UserError, match=rf"rows\.jsonl:2: token {at} \('<far>'\): expected"):
            encode_records(tokenizer, records, small, 500, PromptFormat())
        # One that no row holds is no mistake.
        assert len(encode_records(tokenizer, records[:1], small, 500, PromptFormat())[0]) == 1
        answer = Record("a", "", "b <far>", "b", where="rows.jsonl:9")
        with pytest.raises(UserError, match=r"rows\.jsonl:9: token"):
            encode_records(tokenizer, [answer], small, 500, PromptFormat())

    @pytest.mark.parametrize("ids", [[-1], [0, 320], [2**40]])
    def test_ids_out_of_range(self, tokenizers, ids):
        with pytest.raises(UserError, match=f"token {ids[-1]}: expected 0 to 319"):
            require_embedded(tokenizers["nothing"], ids, 320)


def test_a_format_is_stored_and_read_back():
    written = PromptFormat("chat", "none", "2026-11-29T12:00:00")
    assert stored_prompt_format(written.to_dict(), "x") == written
    assert stored_prompt_format(None, "x") == UNSTORED
    for wrong in (
        {},
        [],
        {"template": "chat"},
        {**written.to_dict(), "more": ""},
        {**written.to_dict(), "special_tokens": "some"},
        {**written.to_dict(), "template": "chatml"},
        {**written.to_dict(), "time": "noon"},
        {**written.to_dict(), "time": "2026-11-29T12:00:00+01:00"},
        {**written.to_dict(), "time": 5},
    ):
        with pytest.raises(UserError, match=r"^adapter: "):
            stored_prompt_format(wrong, "adapter")
