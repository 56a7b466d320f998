"""Log-probabilities of prompts: those of the whole pass, whatever else is asked for and whoever is beside."""

import jax
import numpy as np
import pytest

from milora_jax import generate
from milora_jax.base.transformer import forward, unembed
from milora_jax.data.batches import collate_prompts
from milora_jax.generation.settings import GenerationSettings
from tests.adapted import BASE, make_adapter, text
from tests.generation.decoding import DECODING, make_engine
from tests.models import TINY


def expected_of(adapter, ids):
    """``[T - 1, V]``, by a pass of its own over the one prompt."""
    batch = jax.device_put(collate_prompts([ids], len(ids), 0, rows=1))
    output = forward(BASE, TINY, batch, adapter=adapter)
    return np.asarray(jax.nn.log_softmax(unembed(BASE, TINY, output.hidden[0, :-1])))


def scored(adapter, ids, rows=2, **settings):
    engine = make_engine(adapter, rows=rows)
    request = engine.submit(ids, GenerationSettings(**{"prompt_logprobs": 3, **settings}))
    engine.run()
    return request


@pytest.mark.thorough
@pytest.mark.parametrize("length", [1, 2, 31, 33, 50])
def test_they_are_those_of_the_whole_pass(length):
    adapter, ids = make_adapter(), text(0, length).tolist()
    found, expected = scored(adapter, ids, max_new_tokens=4).prompt_logprobs, expected_of(adapter, ids)
    assert len(found) == length - 1
    for at, each in enumerate(found):
        np.testing.assert_allclose(each.logprob, expected[at, ids[at + 1]], atol=1e-4)
        np.testing.assert_allclose([v for _, v in each.top], np.sort(expected[at])[:-4:-1], atol=1e-4)
        np.testing.assert_allclose(
            [expected[at, i] for i, _ in each.top], [v for _, v in each.top], atol=1e-4
        )


@pytest.mark.thorough
def test_no_new_token_need_be_asked_for():
    ids = text(0, 9).tolist()
    with_text, without = (scored(make_adapter(), ids, max_new_tokens=new) for new in (5, 0))
    assert without.prompt_logprobs == with_text.prompt_logprobs
    assert (without.tokens, without.finish) == ([[]], ["length"])
    whole = scored(make_adapter(), text(0, 64).tolist(), max_new_tokens=0)
    assert len(whole.prompt_logprobs) == 63, "a prompt may fill all positions"
    several = scored(make_adapter(), ids, max_new_tokens=0, num_samples=2)
    assert (several.tokens, several.finish) == ([[], []], ["length"] * 2)
    assert several.prompt_logprobs == without.prompt_logprobs


@pytest.mark.thorough
def test_neither_they_nor_others_depend_on_who_is_there():
    adapter, prompts = make_adapter(), [text(i, 5 + 4 * i).tolist() for i in range(5)]
    settings = [
        GenerationSettings(max_new_tokens=0, prompt_logprobs=2),
        GenerationSettings(max_new_tokens=9, ignore_eos=True),
        GenerationSettings(max_new_tokens=3, prompt_logprobs=1, logprobs=1, num_samples=2, temperature=1.0),
        GenerationSettings(max_new_tokens=7, frequency_penalty=0.5, logit_bias=((5, 3.0),)),
        GenerationSettings(max_new_tokens=1, prompt_logprobs=20),
    ]

    def outcome(request):
        return request.tokens, request.logprobs, request.finish, request.prompt_logprobs

    alone = []
    for prompt, mine in zip(prompts, settings, strict=True):
        engine = make_engine(adapter)
        alone.append(engine.submit(prompt, mine))
        engine.run()
    engine = make_engine(adapter)
    together = [engine.submit(*pair) for pair in zip(prompts, settings, strict=True)]
    engine.run()
    assert [outcome(each) for each in together] == [outcome(each) for each in alone]
    assert [len(each.prompt_logprobs) for each in alone] == [4, 0, 12, 0, 20]


@pytest.mark.thorough
def test_prompts_that_are_prefilled_together_have_their_own():
    adapter, prompts = make_adapter(), [text(i, 6 + i).tolist() for i in range(3)]
    engine = make_engine(adapter, rows=3, prefill_rows=3)
    settings = GenerationSettings(max_new_tokens=1, prompt_logprobs=1)
    requests = [engine.submit(prompt, settings) for prompt in prompts]
    engine.run()
    for prompt, request in zip(prompts, requests, strict=True):
        expected = expected_of(adapter, prompt)
        found = [each.logprob for each in request.prompt_logprobs]
        np.testing.assert_allclose(found, expected[np.arange(len(prompt) - 1), prompt[1:]], atol=1e-4)


def test_generate_hands_them_over():
    ids = text(0, 7).tolist()
    settings = GenerationSettings(max_new_tokens=0, prompt_logprobs=1)

    class Tokenizer:
        def __len__(self):
            return TINY.vocab_size

        def decode(self, tokens, **_):
            return "".join(map(str, tokens))

    (answer,) = generate(DECODING, TINY, Tokenizer(), [ids], settings=settings)
    assert answer.prompt_logprobs == scored(None, ids, prompt_logprobs=1, max_new_tokens=0).prompt_logprobs
    assert (answer.text, answer.tokens) == ("", ())
