"""Speculation by prompt look-up: tokens are those without it, and no row depends on its neighbours."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.errors import UserError
from milora_jax.generation.prompt_lookup import PromptLookup
from milora_jax.generation.settings import GenerationSettings
from tests.adapted import make_adapter
from tests.generation.banks import make_bank
from tests.generation.constraints import SETS, Steps
from tests.generation.decoding import make_engine

NOTHING = -1
REPEATING = [5, 6, 7, 8, 9, 10, 11, 12, 5, 6, 7, 8, 9, 10, 11, 12, 5, 6, 7]


def proposals(text, count, allowed=True, length=24):
    lookup = jax.tree.map(jnp.asarray, PromptLookup.of([text], [allowed], length, count))
    return lookup.proposals(jnp.array([len(text) - 1]))[0].tolist()


def test_what_followed_the_longest_match_is_proposed():
    assert proposals([1, 2, 3, 4, 9, 3, 7, 2, 3], 3) == [4, 9, 3], "two tokens alike beat a later single one"
    assert proposals([1, 2, 3, 5, 1, 2, 3, 6, 1, 2, 3], 2) == [6, 1], "the last of equal ones"
    assert proposals([8, 3, 4, 5, 3], 4) == [4, 5, 3, 4], "a near match is continued periodically"
    assert proposals([7, 7], 3) == [7, 7, 7]


@pytest.mark.parametrize("text", [[1, 2, 3], [4]])
def test_a_text_without_a_match_proposes_nothing(text):
    assert proposals(text, 2) == [NOTHING] * 2


def test_a_row_that_may_not_gets_no_proposal():
    assert proposals([1, 1, 1], 2, allowed=False) == [NOTHING] * 2


def test_what_lies_behind_the_last_token_is_not_looked_at():
    lookup = jax.tree.map(jnp.asarray, PromptLookup.of([[1, 2, 3, 1, 2, 9, 1, 2]], [True], 8, 2))
    assert lookup.proposals(jnp.array([4]))[0].tolist() == [3, 1]


PROMPTS = (
    REPEATING,
    [20, 21, 22, 20, 21],
    [40, 41, 42, 43],
    [9] * 12,
    [3, 1, 4, 1, 5, 9],
    [60, 61] * 5,
)
SETTINGS = (
    GenerationSettings(max_new_tokens=37, ignore_eos=True, logprobs=2),
    GenerationSettings(max_new_tokens=21, ignore_eos=True, temperature=0.4, top_p=0.9, seed=3, logprobs=2),
    GenerationSettings(max_new_tokens=40, ignore_eos=True, repetition_penalty=1.3, logprobs=2),
    GenerationSettings(max_new_tokens=30, ignore_eos=True, logit_bias=((7, 5.0),), logprobs=2),
    GenerationSettings(max_new_tokens=5, logprobs=2),
    GenerationSettings(max_new_tokens=33, stop_token_ids=(11,), num_samples=2, temperature=1.0, logprobs=2),
)


def requests(adapter, lookup, *, rows=3, chunk=4, constraints=None, which=range(6), **more):
    engine = make_engine(adapter, rows=rows, chunk=chunk, prompt_lookup=lookup, **more)
    made = {i: engine.submit(PROMPTS[i], SETTINGS[i], constraint=(constraints or {}).get(i)) for i in which}
    engine.run()
    return made


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["milora", "p_tuning_v2", None])
@pytest.mark.parametrize("lookup", [1, 4])
def test_tokens_are_those_without_it(method, lookup):
    adapter = None if method is None else make_adapter(method=method)
    plain, looked = (requests(adapter, count) for count in (0, lookup))
    for i, request in plain.items():
        assert looked[i].tokens == request.tokens
        assert looked[i].finish == request.finish
        for mine, his in zip(looked[i].logprobs, request.logprobs, strict=True):
            np.testing.assert_allclose([t.logprob for t in mine], [t.logprob for t in his], atol=2e-4)
    assert not any(request.proposed_tokens for request in plain.values())
    repeated = looked[3]
    assert 0 < repeated.accepted_tokens <= repeated.proposed_tokens
    assert repeated.accepted_tokens < len(repeated.tokens[0])


@pytest.mark.thorough
def test_a_text_that_repeats_itself_takes_fewer_steps():
    settings = GenerationSettings(max_new_tokens=40, ignore_eos=True, logit_bias=((7, 1e4),))
    steps = {}
    for lookup in (0, 4):
        engine = make_engine(None, rows=1, chunk=2, prompt_lookup=lookup)
        request = engine.submit([1, 2, 3], settings)
        steps[lookup] = 0
        while not engine.idle:
            engine.step()
            steps[lookup] += 1
        assert request.tokens == [[7] * 40]
    assert steps[4] < steps[0] / 2


@pytest.mark.thorough
@pytest.mark.parametrize("blocks", [{}, {"prefill_budget": 8, "prefill_block": 8, "prefix_cache": 2**20}])
def test_a_row_has_the_bits_that_it_has_alone(blocks):
    """Beside neighbours of all kinds, one of which makes the batch go step by step."""
    adapter = make_adapter()
    for constraints in (None, {4: Steps(SETS)}):
        together = requests(adapter, 3, constraints=constraints, **blocks)
        for i, request in together.items():
            alone = requests(adapter, 3, constraints=constraints, which=[i], **blocks)[i]
            assert alone.tokens == request.tokens
            assert alone.logprobs == request.logprobs
    assert together[4].accepted_tokens == together[4].proposed_tokens == 0


@pytest.mark.thorough
@pytest.mark.parametrize("path", ["one_hot", "gathered", "tpu interpreted"])
def test_tenants_of_a_bank_get_their_own_tokens(path):
    (bank, _), tenants = make_bank(path), {}
    for lookup in (0, 3):
        engine = make_engine(bank.adapters, rows=3, prompt_lookup=lookup)
        made = [
            engine.submit(prompt, dataclasses.replace(SETTINGS[0], logprobs=0), adapter_slot=i % 2)
            for i, prompt in enumerate(PROMPTS)
        ]
        engine.run()
        tenants[lookup] = [request.tokens for request in made]
    assert tenants[0] == tenants[3]


@pytest.mark.parametrize(("count", "most", "slots"), [(-1, 32, 64), (33, 32, 64), (8, 7, 8)])
def test_a_count_that_cannot_be_is_refused(count, most, slots):
    with pytest.raises(UserError, match=rf"prompt_lookup is {count}: expected 0 to {most}"):
        make_engine(None, slots=slots, prompt_lookup=count)
