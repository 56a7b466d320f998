"""Attention block by block equals the plain formula, and so does its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.base import ops
from milora_jax.base.attention import attention as dispatched
from milora_jax.base.ops import Scoring, Window

HEADS, KV_HEADS, WIDTH, ROWS = 4, 2, 8, 3
SCORING = Scoring(WIDTH**-0.5, None)


def attention(q, k, v, mask, window=None, scoring=SCORING):
    return dispatched(q, k, v, mask, scoring, window=window)


def plain(q, k, v, mask, window=None, scoring=SCORING):
    k, v = (jnp.repeat(x, HEADS // KV_HEADS, axis=2) for x in (k, v))
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) * scoring.scale
    if scoring.cap is not None:
        scores = scoring.cap * jnp.tanh(scores / scoring.cap)
    if window is not None:
        mask = mask & (window.queries[:, :, None] - window.keys[:, None, :] < window.size)
    shares = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", shares, v)


def inputs(length, prefix, seed=0):
    """Packed rows; every query sees at least itself."""
    rng = np.random.default_rng(seed)
    segments = jnp.asarray(np.sort(rng.integers(1, 4, (ROWS, length)), axis=1), jnp.int32)
    keys = jnp.concatenate([jnp.ones((ROWS, prefix), jnp.int32), segments], axis=1)
    q, k, v = (
        jnp.asarray(rng.normal(size=(ROWS, size, heads, WIDTH)), jnp.float32)
        for size, heads in ((length, HEADS), (length + prefix, KV_HEADS), (length + prefix, KV_HEADS))
    )
    return q, k, v, ops.attention_mask(segments, keys, prefix)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("length", "prefix", "size", "scoring"),
    [
        (5, 0, None, SCORING),
        (130, 0, None, SCORING),
        (130, 7, None, SCORING),
        (130, 7, 20, Scoring(0.5, 1.5)),
        pytest.param(600, 3, 70, SCORING, marks=pytest.mark.slow),
    ],
)
def test_blocks_equal_the_plain_formula(length, prefix, size, scoring):
    q, k, v, mask = inputs(length, prefix)
    slots = jnp.broadcast_to(jnp.arange(-prefix, length)[None], (ROWS, prefix + length))
    window = None if size is None else Window(slots[:, prefix:], slots, size)

    def loss(function):
        return lambda q, k, v: (function(q, k, v, mask, window, scoring) * jnp.cos(q)).sum()

    found, expected = (function(q, k, v, mask, window, scoring) for function in (attention, plain))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    found = jax.grad(loss(attention), argnums=(0, 1, 2))(q, k, v)
    expected = jax.grad(loss(plain), argnums=(0, 1, 2))(q, k, v)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.thorough
def test_a_query_that_sees_nothing_is_finite_and_gives_nothing_back():
    q, k, v, mask = inputs(70, 0)
    blind = mask.at[:, 60:].set(False)
    found = attention(q, k, v, blind)
    assert bool(jnp.isfinite(found).all())
    np.testing.assert_array_equal(found[:, :60], attention(q, k, v, mask)[:, :60])
    slopes = jax.grad(lambda *x: attention(*x, blind)[:, :60].sum(), argnums=(0, 1, 2))(q, k, v)
    assert all(bool(jnp.isfinite(slope).all()) for slope in slopes)


@pytest.mark.thorough
def test_nothing_of_the_size_of_the_scores_is_kept():
    q, k, v, mask = inputs(128, 0)
    _, back = jax.vjp(lambda *x: attention(*x, mask), q, k, v)
    floats = [leaf.shape for leaf in jax.tree.leaves(back) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert floats
    assert not [shape for shape in floats if shape[-1] >= 128 and shape[-2] >= 64]


@pytest.mark.thorough
def test_bfloat16_stays_bfloat16_and_is_summed_in_float32():
    q, k, v, mask = inputs(130, 0)
    small = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    found = attention(*small, mask)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), attention(q, k, v, mask), atol=0.03)
    slopes = jax.grad(lambda *x: attention(*x, mask).astype(jnp.float32).sum(), argnums=(0, 1, 2))(*small)
    assert {slope.dtype for slope in slopes} == {jnp.dtype("bfloat16")}
