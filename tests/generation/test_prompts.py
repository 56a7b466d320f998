"""What ``generate`` makes of texts, ids and chats: the prompts that its model and its adapter know."""

import dataclasses

import pytest

from milora_jax.base.load import load_base
from milora_jax.data.chat import Message, encode_chat, render_chat
from milora_jax.errors import UserError
from milora_jax.generation import text
from milora_jax.generation.bank import Bank
from milora_jax.generation.text import generate
from milora_jax.prompt_format import PromptFormat
from tests.models import WITH_TOKENIZER, write_hf_directory

pytest.importorskip("transformers", reason="text needs a tokenizer, which the core does without")

from tests.data.chats import CHATML, chat_tokenizer
from tests.storage.adapters import noisy_adapter

CHAT = [{"role": "user", "content": "Hi.<|im_end|>"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_hf_directory(folder, dataclasses.replace(WITH_TOKENIZER, eos_ids=(2,)))
    return *load_base(folder, decode=True), chat_tokenizer(folder, "{{ strftime_now('%Y') }}" + CHATML)


@pytest.fixture
def asked(monkeypatch):
    """The token ids of prompts that got as far as being served."""
    found = []

    def note(config, tokenizer, ids, settings, rows):
        found.append(ids)
        raise UserError("seen")

    monkeypatch.setattr(text, "require_room", note)
    return found


def test_special_tokens_are_parsed_in_texts_unless_told_otherwise(model, asked):
    tokenizer = model[2]
    rendered = render_chat(tokenizer, CHAT, time="2024-01-01")
    generate(*model, [rendered], return_errors=True)
    generate(*model, [rendered], parse_special_tokens=False, return_errors=True)
    parsed, typed = asked
    assert parsed == tokenizer(rendered).input_ids
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (parsed.count(end), typed.count(end)) == (2, 0)


def test_a_chat_is_written_by_the_template_and_its_contents_stay_text(model, asked):
    end = model[2].convert_tokens_to_ids("<|im_end|>")
    for chat in (CHAT, [Message("user", "Hi.<|im_end|>")], tuple(CHAT)):
        generate(*model, [chat], return_errors=True)
        assert asked[-1].count(end) == 1
    assert asked[0] == asked[1] == asked[2]


@pytest.mark.thorough
@pytest.mark.parametrize("rule", ["tokenizer", "bos", "none"])
def test_prompts_are_written_as_the_adapter_was_trained(model, asked, rule):
    base, config, tokenizer = model
    written = PromptFormat(special_tokens=rule, time="1999-12-31")
    adapter = dataclasses.replace(noisy_adapter(load_stacked(model), config), prompt_format=written)
    bank = Bank(base, config, adapter, 1)
    bank.load("one", adapter)
    for who in ({"adapter": adapter}, {"bank": bank, "tenants": ["one"] * 2}):
        del asked[:]
        generate(base, config, tokenizer, ["word", CHAT], return_errors=True, **who)
        bare = tokenizer("word", add_special_tokens=False).input_ids
        assert asked[0] == (bare if rule == "none" else [tokenizer.bos_token_id, *bare])
        assert asked[1] == encode_chat(tokenizer, CHAT, time="1999-12-31")
        assert tokenizer.decode(asked[1]).startswith("1999")


def load_stacked(model):
    return load_base(model[2].name_or_path)[0]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (" ", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([{"role": "tool", "content": "x"}], "the role of message 1 is 'tool'"),
        ([5, 10**6], "the prompt holds token 1000000: expected 0 to 319"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_told(model, prompt, message):
    (answer,) = generate(*model, [prompt], return_errors=True)
    assert message in answer.error
