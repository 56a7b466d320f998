"""What a step keeps: no logits of all tokens, no more activations than asked for, no second state."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from milora_jax.base.transformer import unembed
from milora_jax.config import REMAT
from milora_jax.training.cross_entropy import summed_cross_entropy
from tests.models import TINY, random_base
from tests.programs import compiled, frozen_shaped_dots
from tests.training.steps import MODEL, SETTINGS, prepare, rows

ROWS, LENGTH = 3, 14
ODD = rows(count=5)
"""60 tokens, so that no activation has the shape of a weight."""


def dense(base, hidden, targets, counted, config=TINY):
    losses = optax.softmax_cross_entropy_with_integer_labels(unembed(base, config, hidden), targets)
    return jnp.where(counted, losses, 0.0).sum()


@pytest.mark.thorough
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 15, 42, 1000])
def test_the_chunks_sum_to_the_whole(tied, chunk, cap):
    config = dataclasses.replace(TINY, tie_embeddings=tied, final_softcap=cap)
    base = random_base(config)
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(ROWS, LENGTH, TINY.hidden_size)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, TINY.vocab_size, (ROWS, LENGTH)), jnp.int32)
    counted = jnp.asarray(rng.random((ROWS, LENGTH)) < 0.5)

    def chunked(hidden):
        return 3 * summed_cross_entropy(base, config, hidden, targets, counted, chunk)

    value, gradient = jax.value_and_grad(lambda h: 3 * dense(base, h, targets, counted, config))(hidden)
    found, slope = jax.value_and_grad(chunked)(hidden)
    np.testing.assert_allclose(found, value, rtol=1e-6)
    np.testing.assert_allclose(chunked(hidden), value, rtol=1e-6)
    np.testing.assert_allclose(slope, gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.thorough
def test_bfloat16_is_summed_in_float32():
    base = random_base(dtype="bfloat16")
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(ROWS, LENGTH, TINY.hidden_size)), jnp.bfloat16)
    targets = jnp.zeros((ROWS, LENGTH), jnp.int32)
    found, slope = jax.value_and_grad(
        lambda h: summed_cross_entropy(base, TINY, h, targets, jnp.ones_like(targets, bool), 8)
    )(hidden)
    assert (found.dtype, slope.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(found, dense(base, hidden, targets, True), rtol=1e-5)


def compiled_step(batch=None, **settings):
    settings = dataclasses.replace(SETTINGS, **settings)
    state, steps = prepare(settings=settings)
    return compiled(steps.train.lower(state, random_base(MODEL), batch or rows())), state


def logits_at_once(program):
    """The most tokens whose logits are one array of a program."""
    shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"f32\[([\d,]+)\]", program)}
    with_vocabulary = [s for s in shapes if s[-1] == MODEL.vocab_size and MODEL.hidden_size not in s]
    return max(math.prod(shape[:-1]) for shape in with_vocabulary)


@pytest.mark.thorough
def test_the_logits_of_all_tokens_never_exist():
    for chunk in (ODD.tokens.size, 20):
        assert logits_at_once(compiled_step(ODD, loss_chunk=chunk)[0].as_text()) == chunk


@pytest.mark.slow
def test_remat_changes_memory_and_nothing_else():
    found, memory = {}, {}
    for remat in REMAT:
        settings = dataclasses.replace(SETTINGS, remat=remat)
        state, steps = prepare(settings=settings)
        program = compiled(steps.train.lower(state, random_base(MODEL), ODD))
        memory[remat] = program.memory_analysis().temp_size_in_bytes
        assert not frozen_shaped_dots(program.as_text())
        found[remat] = program(state, random_base(MODEL), ODD)
    assert memory["full"] < memory["products"] < memory["none"], memory
    for remat in REMAT[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            (found[remat][0].omega_state, found[remat][1]),
            (found["none"][0].omega_state, found["none"][1]),
        )


@pytest.mark.slow
def test_parts_need_less_memory():
    whole, _ = compiled_step()
    parts, _ = compiled_step(accumulate=4)
    assert parts.memory_analysis().temp_size_in_bytes < 0.6 * whole.memory_analysis().temp_size_in_bytes


@pytest.mark.thorough
def test_the_state_is_donated():
    program, state = compiled_step()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(dataclasses.replace(state, key=None)))
    assert program.memory_analysis().alias_size_in_bytes >= size
