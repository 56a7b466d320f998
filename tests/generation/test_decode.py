"""Decoding: the route is carried, the cache is exact, padding and neighbours do not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.base.transformer import adapter_decode_layout, decode_layout, forward, unembed
from milora_jax.generation.decode import decode_chunk, decode_step, generate_tokens, prefill
from milora_jax.types import stack_layers
from tests.models import TINY, random_base
from tests.training.test_equalities import make_adapter, row_batch, run, stack, text

BASE = decode_layout(random_base(TINY))
ADAPTER = adapter_decode_layout(make_adapter())
EMPTY = np.zeros(0, np.int64)
NEW = 12


def greedy_by_full_forward(prompt, adapter, count):
    """Greedy tokens and their logits, each from a fresh pass over the whole text."""
    tokens, logits = list(prompt), []
    for _ in range(count):
        batch = row_batch(prompt, np.array(tokens[len(prompt) :], np.int64), length=24)
        output = run(adapter, batch, base=BASE)
        logits.append(np.asarray(unembed(BASE, output.hidden[0, len(tokens) - 1])))
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :], logits


jitted_decode_step = jax.jit(decode_step, static_argnames="config")


@jax.jit
def one_step(base, adapter, state):
    """The forward pass of a decode step."""
    return forward(
        base,
        TINY,
        state.token[:, None],
        state.position[:, None],
        jnp.ones_like(state.token)[:, None],
        adapter=adapter,
        route_weights=state.route,
        cache=state.cache,
    )


def until_end(tokens):
    ends = np.flatnonzero(np.isin(tokens, TINY.eos_ids))
    return list(tokens[: ends[0] + 1] if len(ends) else tokens)


@pytest.mark.parametrize("adapter", [None, ADAPTER, adapter_decode_layout(make_adapter(method="lora"))])
def test_cached_decode_equals_the_full_forward(adapter):
    prompt = text(0, 9)
    expected, logits = greedy_by_full_forward(prompt, adapter, NEW)
    found, _ = generate_tokens(BASE, adapter, row_batch(prompt, EMPTY), TINY, NEW)
    assert until_end(found[0]) == until_end(np.array(expected))
    state, _ = prefill(BASE, adapter, row_batch(prompt, EMPTY), TINY, 9 + NEW)
    for step in range(1, 4):
        hidden = one_step(BASE, adapter, state).hidden
        np.testing.assert_allclose(unembed(BASE, hidden)[0, 0], logits[step], rtol=1e-4, atol=1e-4)
        state = jitted_decode_step(BASE, adapter, state, TINY)


def test_the_route_of_prefill_is_the_route_of_training_and_never_changes():
    prompt = text(3, 8)
    batch = row_batch(prompt, text(4, 6))
    trained = run(ADAPTER, batch, base=BASE).route
    state, route = prefill(BASE, ADAPTER, row_batch(prompt, EMPTY), TINY, 32)
    np.testing.assert_array_equal(route.weights != 0, trained.weights != 0)
    np.testing.assert_allclose(route.probs, trained.probs, rtol=1e-5, atol=1e-7)
    before = np.stack(state.route)
    state, _ = decode_chunk(BASE, ADAPTER, state, TINY, 8)
    np.testing.assert_array_equal(np.stack(state.route), before)


@pytest.mark.parametrize("left", [False, True])
def test_padding_and_neighbours_do_not_change_a_row(left):
    prompts = [text(10 + i, length) for i, length in enumerate((3, 9, 6, 11))]
    alone = [generate_tokens(BASE, ADAPTER, row_batch(p, EMPTY), TINY, NEW)[0][0] for p in prompts]
    batch = stack(*(row_batch(p, EMPTY, length=14, left=left) for p in prompts))
    together, _ = generate_tokens(BASE, ADAPTER, batch, TINY, NEW)
    for row, expected in zip(together, alone, strict=True):
        assert until_end(row) == until_end(expected)


def test_a_row_that_stopped_repeats_its_end_token():
    prompts = [text(20 + i, 6) for i in range(16)]
    first, _ = greedy_by_full_forward(prompts[0], None, 4)
    config = TINY.__class__(**{**vars(TINY), "eos_ids": (first[2],)})
    batch = stack(*(row_batch(p, EMPTY) for p in prompts))
    tokens, _ = generate_tokens(BASE, None, batch, config, NEW)
    stop = first.index(first[2])
    assert (tokens[0, stop:] == first[2]).all()
    assert tokens.shape == (16, NEW)


@pytest.mark.parametrize("count", [1, 2, 16, 17, 18, 33])
def test_any_number_of_new_tokens(count):
    batch = row_batch(text(0, 4), EMPTY)
    config = TINY.__class__(**{**vars(TINY), "eos_ids": ()})
    longest, _ = generate_tokens(BASE, ADAPTER, batch, config, 33)
    tokens, _ = generate_tokens(BASE, ADAPTER, batch, config, count)
    assert tokens.shape == (1, count)
    np.testing.assert_array_equal(tokens, longest[:, :count])


def test_scan_equals_loop_with_a_cache():
    batch = row_batch(text(0, 6), EMPTY)
    state, _ = prefill(BASE, ADAPTER, batch, TINY, 10)
    stacked_base, stacked_adapter = random_base(TINY), make_adapter()
    stacked_cache = state.cache.replace(layers=stack_layers(state.cache.layers))
    looped = one_step(BASE, ADAPTER, state)
    stacked_state = state.replace(cache=stacked_cache, route=jnp.stack(state.route))
    scanned = one_step(stacked_base, stacked_adapter, stacked_state)
    np.testing.assert_allclose(scanned.hidden, looped.hidden, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        scanned.cache.layers.k, np.stack([c.k for c in looped.cache.layers]), atol=1e-6
    )


def compiled_chunk(adapter):
    state, _ = prefill(BASE, adapter, row_batch(text(0, 6), EMPTY), TINY, 40)
    return decode_chunk.lower(BASE, adapter, state, TINY, 16).compile().as_text()


def test_the_decode_program_holds_no_router_and_no_conditional():
    program = compiled_chunk(ADAPTER)
    routing, _ = prefill.lower(BASE, ADAPTER, row_batch(text(0, 6), EMPTY), TINY, 40), None
    assert "topk" in routing.compile().as_text().lower().replace("_", "").replace("-", "")
    assert "topk" not in program.lower().replace("_", "").replace("-", "")
    assert " conditional(" not in program
    assert "/route/" not in program
    assert "/attention/" in program


def test_one_compile_per_shape():
    before = decode_chunk._cache_size()
    for seed in range(3):
        batch = stack(*(row_batch(text(seed + i, 5), EMPTY) for i in range(3)))
        generate_tokens(BASE, ADAPTER, batch, TINY, 40)
    assert decode_chunk._cache_size() == before + 1
    assert jax.tree.structure(ADAPTER.params[0]) == jax.tree.structure(ADAPTER.params[1])
