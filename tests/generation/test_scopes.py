"""Generation with routers that read a part of the prompt: engine, bank, beams, chats."""

import numpy as np
import pytest

from milora_jax.base.modules import decode_layout
from milora_jax.data.chat import Message
from milora_jax.data.scopes import EncodedPrompt
from milora_jax.errors import UserError
from milora_jax.evaluation.routing import route_prompts
from milora_jax.generation.bank import Bank
from milora_jax.generation.settings import GenerationSettings
from milora_jax.generation.text import generate
from milora_jax.prompt_format import PromptFormat
from tests.adapted import make_adapter, text
from tests.data.chats import CHATML, chat_tokenizer
from tests.generation.decoding import DECODING, make_engine
from tests.models import TINY, WITH_TOKENIZER, random_base
from tests.storage.adapters import noisy_adapter

pytest.importorskip("transformers", reason="chats need a tokenizer, which the core does without")

SETTINGS = GenerationSettings(max_new_tokens=6, ignore_eos=True)


def route_of(request):
    return np.asarray(request.route)


@pytest.mark.thorough
def test_rows_of_a_batch_each_have_their_scope():
    """Whoever the neighbours are, and whether prompts are prefilled together or alone."""
    adapter, prompts = make_adapter(gate="softmax"), [text(i, 20).tolist() for i in range(4)]
    scopes = [0, 5, 12, 20]
    alone = []
    for prompt, scope in zip(prompts, scopes, strict=True):
        engine = make_engine(adapter, rows=4, prefill_rows=2)
        alone.append(engine.submit(prompt, SETTINGS, route_tokens=scope))
        engine.run()
    engine = make_engine(adapter, rows=4, prefill_rows=2)
    made = [engine.submit(p, SETTINGS, route_tokens=s) for p, s in zip(prompts, scopes, strict=True)]
    engine.run()
    for one, other, prompt, scope in zip(alone, made, prompts, scopes, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_array_equal(route_of(one), route_of(other))
        leading = route_prompts(DECODING, TINY, adapter, [prompt[: scope or len(prompt)]]).weights[0]
        np.testing.assert_allclose(route_of(one), leading, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="route_tokens is 21: expected 0 to 20"):
        engine.submit(prompts[0], SETTINGS, route_tokens=21)


def test_a_bank_holds_adapters_that_read_different_parts():
    adapters = {
        part: make_adapter(seed=10 * i, route_on=part).replace(prompt_format=PromptFormat("chat"))
        for i, part in enumerate(("prompt", "first_turn", "system"))
    }
    bank = Bank(DECODING, TINY, adapters["prompt"], 3)
    for name, adapter in adapters.items():
        bank.load(name, adapter)
        assert bank.prompt_formats[name] == PromptFormat("chat", route_on=name)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return chat_tokenizer(tmp_path_factory.mktemp("chat"), CHATML)


TALK = [
    Message("system", "Be brief."),
    Message("user", "What is 1 + 1?"),
    Message("assistant", "2"),
    Message("user", "Why?"),
    Message("assistant", "So it is."),
    Message("user", "And 2 + 2?"),
]


@pytest.mark.thorough
@pytest.mark.parametrize(("part", "same"), [("prompt", False), ("first_turn", True), ("system", True)])
def test_every_turn_of_a_chat_has_the_route_of_its_first(tokenizer, part, same):
    base = random_base(WITH_TOKENIZER)
    adapter = noisy_adapter(base, WITH_TOKENIZER, route_on=part, gate="softmax")
    adapter = adapter.replace(prompt_format=PromptFormat("chat"))

    def routes(settings, **more):
        chats = [TALK[:2], TALK[:4], TALK]
        given = decode_layout(base), WITH_TOKENIZER, tokenizer, chats
        answers = generate(*given, adapter=adapter, settings=settings, batch_size=4, **more)
        return [answer.route for answer in answers]

    for settings in (SETTINGS, GenerationSettings(max_new_tokens=3, num_beams=2)):
        found = routes(settings)
        assert len(found) == 3
        alike = [np.allclose(found[0], other, rtol=1e-5, atol=1e-6) for other in found[1:]]
        assert alike == [same, same]
    np.testing.assert_allclose(routes(SETTINGS, merge=True), routes(SETTINGS), rtol=1e-5, atol=1e-6)


@pytest.mark.thorough
def test_a_text_is_one_turn_and_has_no_system_message(tokenizer):
    base = random_base(WITH_TOKENIZER)
    adapter = noisy_adapter(base, WITH_TOKENIZER, route_on="system").replace(
        prompt_format=PromptFormat("chat")
    )
    given = decode_layout(base), WITH_TOKENIZER, tokenizer
    prompts = ["1 + 1", [5, 6, 7], [Message("user", "hi")], EncodedPrompt([5, 6, 7, 8], 2)]
    answers = generate(*given, prompts, adapter=adapter, settings=SETTINGS, return_errors=True)
    said = [answer.error for answer in answers]
    assert ["no chat" in said[0], "no chat" in said[1], "no system message" in said[2], said[3]] == [
        1,
        1,
        1,
        "",
    ]
    first = adapter.replace(
        method=adapter.method.__class__(**{**vars(adapter.method), "route_on": "first_turn"})
    )
    answers = generate(*given, prompts, adapter=first, settings=SETTINGS)
    assert all(answer.route is not None for answer in answers)
