"""Choosing tokens: every setting does what its name says, row by row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.errors import UserError
from milora_jax.generation.sampling import (
    Plan,
    _kept,
    _over_temperature,
    _penalized,
    choose,
    is_end,
    make_sampler,
    note,
)
from milora_jax.generation.settings import MOST_BIASES, MOST_STOPS, GenerationSettings
from tests.adapted import make_adapter, text
from tests.generation.decoding import decoded, make_engine
from tests.models import TINY

VOCAB = 11
ALL = Plan(sampled=True, limited=True, penalized=True, logprobs=True)


def logits_of(seed, rows=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, VOCAB)) * 2, jnp.float32)


def sampler_of(*settings, prompts=None, samples=None):
    prompts = prompts or [[1]] * len(settings)
    samples = samples or [0] * len(settings)
    return jax.tree.map(jnp.asarray, make_sampler(settings, samples, prompts, (2,), VOCAB, True))


def kept(logits, **settings):
    """Which tokens may be drawn."""
    scores = _kept(logits, sampler_of(GenerationSettings(temperature=1.0, **settings)))
    return np.flatnonzero(np.isfinite(np.asarray(scores)[0])).tolist()


def test_top_k_keeps_the_k_most_probable():
    logits = logits_of(0)
    order = np.argsort(-np.asarray(logits)[0])
    assert kept(logits, top_k=3) == sorted(order[:3].tolist())
    assert kept(logits, top_k=0) == kept(logits, top_k=VOCAB) == kept(logits, top_k=500) == list(range(VOCAB))


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.7, 0.95, 1.0])
def test_top_p_keeps_the_smallest_set_with_that_probability(top_p):
    logits = logits_of(1)
    probs = np.asarray(jax.nn.softmax(logits))[0]
    order = np.argsort(-probs)
    size = next(n for n in range(1, VOCAB + 1) if probs[order[:n]].sum() >= top_p - 1e-6)
    assert kept(logits, top_p=top_p) == sorted(order[:size].tolist())


def test_min_p_keeps_what_is_at_least_that_fraction_of_the_best():
    logits = logits_of(2)
    probs = np.asarray(jax.nn.softmax(logits))[0]
    assert kept(logits, min_p=0.2) == np.flatnonzero(probs >= 0.2 * probs.max()).tolist()
    assert kept(logits, min_p=1.0) == [int(probs.argmax())]


def test_top_p_is_taken_of_what_top_k_left():
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))
    sampler = jax.tree.map(
        jnp.asarray,
        make_sampler([GenerationSettings(temperature=1.0, top_k=2, top_p=0.5)], [0], [[0]], (), 4, True),
    )
    # Of all tokens 0.4 + 0.3 reaches a half; of the two that are left the first alone does: 0.4 / 0.7.
    assert np.isfinite(np.asarray(_kept(logits, sampler))[0]).tolist() == [True, False, False, False]


@pytest.mark.thorough
def test_draws_follow_the_distribution():
    probs = np.array([0.5, 0.3, 0.15, 0.05])
    rows = 4000
    settings = [GenerationSettings(temperature=2.0, seed=i) for i in range(rows)]
    sampler = jax.tree.map(jnp.asarray, make_sampler(settings, [0] * rows, [[0]] * rows, (), 4, False))
    # Twice the log-probabilities at temperature 2 are the probabilities.
    logits = jnp.broadcast_to(2 * jnp.log(jnp.asarray(probs, jnp.float32)), (rows, 4))
    draw = jax.jit(choose, static_argnums=3)
    tokens = draw(logits, sampler, jnp.zeros((rows,), jnp.int32), Plan(sampled=True)).token
    share = np.bincount(np.asarray(tokens), minlength=4) / rows
    assert np.abs(share - probs).max() < 4 * np.sqrt(0.25 / rows)


@pytest.mark.thorough
def test_a_draw_depends_on_seed_sample_and_position_and_on_nothing_else():
    settings = GenerationSettings(temperature=1.0, seed=5)
    flat = jnp.zeros((3, VOCAB))

    def draw(sampler, positions):
        return choose(flat, sampler, jnp.asarray(positions, jnp.int32), ALL).token.tolist()

    def column(**changes):
        one = [dataclasses.replace(settings, **changes)] * 3
        return [draw(sampler_of(*one), [p, p, p]) for p in range(40)]

    mine = column()
    assert all(len(set(tokens)) == 1 for tokens in mine), "the place in the batch matters"
    assert len({tokens[0] for tokens in mine}) > 3, "every position draws anew"
    assert column(seed=6) != mine
    samples = draw(sampler_of(settings, settings, settings, samples=[0, 1, 2]), [7, 7, 7])
    again = draw(sampler_of(settings, settings, settings, samples=[2, 1, 0]), [7, 7, 7])
    assert samples == again[::-1]


@pytest.mark.thorough
def test_temperature_zero_is_greedy_beside_rows_that_draw():
    logits = logits_of(3, rows=2)
    both = sampler_of(GenerationSettings(), GenerationSettings(temperature=1.0))
    token = choose(logits, both, jnp.zeros((2,), jnp.int32), ALL).token
    assert token[0] == jnp.argmax(logits[0])


def test_penalties():
    logits = jnp.asarray([[2.0, -1.0, 1.5, 0.5] + [-9.0] * (VOCAB - 4)])
    settings = GenerationSettings(repetition_penalty=2.0, presence_penalty=0.75)
    sampler = sampler_of(settings, prompts=[[0, 1]])
    assert choose(logits, sampler, jnp.zeros((1,), jnp.int32), ALL).token.tolist() == [2]
    # The first is halved for being in the prompt; then 2, produced, is halved and loses 0.75.
    sampler = note(sampler, jnp.array([2]), jnp.array([True]))
    assert choose(logits, sampler, jnp.zeros((1,), jnp.int32), ALL).token.tolist() == [0]
    untouched = note(sampler, jnp.array([5]), jnp.array([False]))
    assert not untouched.in_text[0, 5]


def test_log_probabilities_are_those_before_penalties_and_temperature():
    logits = logits_of(4)
    settings = GenerationSettings(temperature=3.0, repetition_penalty=5.0, logprobs=3, top_k=1)
    choice = choose(logits, sampler_of(settings), jnp.zeros((1,), jnp.int32), ALL)
    expected = np.asarray(jax.nn.log_softmax(logits))[0]
    np.testing.assert_allclose(choice.logprob[0], expected[int(choice.token[0])], rtol=1e-6)
    order = np.argsort(-expected)
    np.testing.assert_array_equal(choice.top_tokens[0], order)
    np.testing.assert_allclose(choice.top_logprobs[0], expected[order], rtol=1e-6)


def test_ends_are_stop_tokens_and_the_length():
    sampler = sampler_of(
        GenerationSettings(max_new_tokens=2, stop_token_ids=(7,)), GenerationSettings(ignore_eos=True)
    )
    assert is_end(sampler, jnp.array([7, 7])).tolist() == [True, False]
    assert is_end(sampler, jnp.array([2, 2])).tolist() == [True, False]
    for _ in range(2):
        sampler = note(sampler, jnp.array([3, 3]), jnp.array([True, True]))
    assert is_end(sampler, jnp.array([3, 3])).tolist() == [True, False]


MISTAKES = {
    "max_new_tokens": [0, -1, 2.5, True],
    "temperature": [-0.1, float("nan"), float("inf")],
    "top_k": [-1],
    "top_p": [0.0, 1.1, float("nan")],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0.0, -1.0],
    "presence_penalty": [float("nan")],
    "frequency_penalty": [float("inf"), "1"],
    "prompt_logprobs": [-1, 21],
    "logit_bias": [
        [(1, 2.0)],
        ((1,),),
        ((1, float("nan")),),
        ((-1, 0.0),),
        ((True, 0.0),),
        ((1, 0.0), (1, 1.0)),
        tuple((i, 0.0) for i in range(MOST_BIASES + 1)),
    ],
    "seed": [-1, 2**32],
    "logprobs": [-1, 21],
    "num_samples": [0],
    "num_beams": [0],
    "stop": [("",), tuple("abcdefghijklmnopqrstuvwxyz")],
    "stop_token_ids": [(-1,), tuple(range(MOST_STOPS + 1))],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in MISTAKES.items() for v in values])
def test_settings_out_of_range_are_refused_by_name(name, value):
    settings = GenerationSettings()
    # Not through the checked constructor: values of another type must be refused as well.
    object.__setattr__(settings, name, value)
    with pytest.raises(UserError, match=f"^{name}( of a token)? is"):
        settings.__post_init__()


def test_beam_search_takes_no_sampling_settings():
    refused = [{"temperature": 1.0}, {"num_samples": 2}, {"repetition_penalty": 1.5}]
    refused += [{"frequency_penalty": 1.0}, {"logit_bias": ((1, 1.0),)}, {"prompt_logprobs": 1}]
    for more in refused:
        with pytest.raises(UserError, match="under beam search"):
            GenerationSettings(num_beams=2, **more)


@pytest.mark.thorough
def test_samples_of_a_prompt_are_what_they_are_alone():
    settings = GenerationSettings(max_new_tokens=10, temperature=1.0, seed=3, ignore_eos=True)
    engine = make_engine(make_adapter(), rows=4)
    together = engine.submit(text(0, 6).tolist(), dataclasses.replace(settings, num_samples=4))
    engine.run()
    assert len({tuple(tokens) for tokens in together.tokens}) == 4
    engine = make_engine(make_adapter(), rows=4)
    alone = engine.submit(text(0, 6).tolist(), settings)
    beside = engine.submit(text(1, 9).tolist(), dataclasses.replace(settings, seed=9))
    engine.run()
    assert alone.tokens[0] == together.tokens[0]
    assert beside.tokens[0] != alone.tokens[0]


@pytest.mark.thorough
def test_a_stop_token_ends_a_row_and_logprobs_come_with_every_token():
    (whole,) = decoded(make_adapter(), [text(0, 6)], 12, ignore_eos=True)
    stop = whole[4]
    engine = make_engine(make_adapter())
    settings = GenerationSettings(max_new_tokens=12, stop_token_ids=(stop,), ignore_eos=True, logprobs=2)
    made = engine.submit(text(0, 6).tolist(), settings)
    engine.run()
    assert made.tokens[0] == whole[: whole.index(stop) + 1]
    assert made.finish == ["stop"]
    assert len(made.logprobs[0]) == len(made.tokens[0])
    for token, logprobs in zip(made.tokens[0], made.logprobs[0], strict=True):
        assert logprobs.top[0] == (token, logprobs.logprob)
        assert len(logprobs.top) == 2


def test_requests_that_nobody_wants_any_more_leave_their_rows():
    engine = make_engine(make_adapter(), rows=2)
    settings = GenerationSettings(max_new_tokens=40, ignore_eos=True)
    running, waiting, half = (
        engine.submit(text(i, 5).tolist(), dataclasses.replace(settings, num_samples=i)) for i in (1, 2, 2)
    )
    engine.end(half, 1, "cancelled")
    engine.step()
    engine.end(running, 0, "cancelled")
    for sample in range(2):
        engine.end(waiting, sample, "cancelled")
    engine.run()
    assert engine.idle
    assert 0 < len(running.tokens[0]) < 40
    assert waiting.tokens == [[], []]
    assert half.finish == ["length", "cancelled"]
    assert [len(tokens) for tokens in half.tokens] == [40, 0]


def test_a_bad_request_is_refused_and_the_others_are_unaffected():
    engine = make_engine(make_adapter())
    good = engine.submit(text(0, 6).tolist(), GenerationSettings(max_new_tokens=5))
    for prompt, settings, message in (
        ([], {}, "prompt is 'empty'"),
        ([TINY.vocab_size], {}, "outside the vocabulary|a token id of the prompt"),
        ([5] * 60, {}, "60 tokens and may get 5 new ones: expected at most 64"),
        ([5], {"stop_token_ids": (97,)}, "stop_token_ids"),
        ([5], {"logit_bias": ((97, 1.0),)}, "logit_bias of a token"),
        ([5], {"num_samples": 3}, "at most the batch's 2 rows"),
    ):
        with pytest.raises(UserError, match=message):
            engine.submit(prompt, GenerationSettings(max_new_tokens=5, **settings))
    engine.run()
    assert good.tokens[0] == decoded(make_adapter(), [text(0, 6)], 5)[0]


@pytest.mark.thorough
def test_nothing_is_sorted_where_no_row_has_a_limit():
    logits, settings = logits_of(3, rows=4), [GenerationSettings(temperature=0.8, seed=i) for i in range(4)]
    sampler, position = sampler_of(*settings), jnp.arange(4, dtype=jnp.int32)
    assert Plan.of(settings) == Plan(sampled=True)
    limited = Plan.of([*settings, GenerationSettings(temperature=1.0, top_p=0.9)])
    assert limited == Plan(sampled=True, limited=True)
    np.testing.assert_array_equal(_kept(logits, sampler), logits)
    plain, sorted_ = (
        jax.jit(lambda plan: choose(logits, sampler, position, plan).token, static_argnums=0).lower(plan)
        for plan in (Plan(sampled=True), limited)
    )
    assert "sort" not in plain.as_text()
    assert "sort" in sorted_.as_text()
    np.testing.assert_array_equal(plain.compile()(), sorted_.compile()())


def test_bias_and_penalties_are_those_of_vllm():
    """Its formula: bias, then repetition, then frequency by the count in the text, then presence."""
    rng = np.random.default_rng(2)
    logits = (rng.normal(size=(5, VOCAB)) * 2).astype(np.float32)
    prompt, produced = [3, 4, 4], [5, 5, 3, 7, 5]
    settings = [
        {"frequency_penalty": 0.75},
        {"frequency_penalty": -1.5, "presence_penalty": 0.5},
        {"repetition_penalty": 1.25, "frequency_penalty": 2.0, "presence_penalty": -0.5},
        {"logit_bias": ((1, -100.0), (9, 2.5))},
        {"logit_bias": ((5, 100.0), (0, -1.0)), "repetition_penalty": 2.0, "frequency_penalty": 0.25},
    ]
    rows = [GenerationSettings(**each) for each in settings]
    sampler = sampler_of(*rows, prompts=[prompt] * len(rows))
    for token in produced:
        sampler = note(sampler, jnp.full((len(rows),), token), jnp.ones((len(rows),), bool))
    found = np.asarray(_penalized(jnp.asarray(logits), sampler))
    counts = np.bincount(produced, minlength=VOCAB)
    seen = np.isin(np.arange(VOCAB), prompt) | (counts > 0)
    for row, mine in enumerate(rows):
        expected = logits[row].copy()
        for token, bias in mine.logit_bias:
            expected[token] += bias
        factor = np.where(seen, mine.repetition_penalty, 1.0)
        expected = np.where(expected > 0, expected / factor, expected * factor)
        expected -= mine.frequency_penalty * counts
        expected -= mine.presence_penalty * (counts > 0)
        np.testing.assert_allclose(found[row], expected, rtol=1e-6, err_msg=str(mine))


@pytest.mark.thorough
def test_a_bias_forbids_or_forces_a_token_and_counts_only_what_was_produced():
    plain, forced = decoded(make_adapter(), [text(0, 6)], 8, ignore_eos=True)[0], 41
    (banned,) = decoded(make_adapter(), [text(0, 6)], 8, ignore_eos=True, logit_bias=((plain[0], -100.0),))
    assert plain[0] not in banned
    (only,) = decoded(make_adapter(), [text(0, 6)], 8, ignore_eos=True, logit_bias=((forced, 100.0),))
    assert only == [forced] * 8
    more = {"logit_bias": ((forced, 100.0),), "frequency_penalty": 40.0}
    (worn,) = decoded(make_adapter(), [[forced] * 6], 8, ignore_eos=True, **more)
    assert worn[:2] == [forced] * 2, "what the prompt holds does not count"
    assert worn.count(forced) < 8


@pytest.mark.parity
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"repetition_penalty": 1.7},
        {"temperature": 1.6, "top_k": 9, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3},
    ],
)
def test_sampling_scores_equal_hugging_face(settings):
    """The logits that a token is drawn from, after all of Hugging Face's processors in their order."""
    import torch
    from transformers import generation as hf

    rows, vocab = 6, 40
    logits = np.random.default_rng(0).normal(size=(rows, vocab)).astype(np.float32) * 3
    prompts = np.random.default_rng(1).integers(0, vocab, (rows, 7))
    made = {
        "repetition_penalty": hf.RepetitionPenaltyLogitsProcessor,
        "temperature": hf.TemperatureLogitsWarper,
        "top_k": hf.TopKLogitsWarper,
        "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
    }
    expected = torch.from_numpy(logits.copy())
    for name, processor in made.items():
        if name in settings:
            expected = processor(settings[name])(torch.from_numpy(prompts), expected)
    mine = GenerationSettings(**{"temperature": 1.0, **settings})
    sampler = make_sampler([mine] * rows, [0] * rows, prompts.tolist(), (), vocab, True)
    sampler = jax.tree.map(jnp.asarray, sampler)
    scores = _over_temperature(_penalized(jnp.asarray(logits), sampler), sampler)
    found = np.asarray(_kept(scores, sampler))
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected.numpy()))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)
