"""Attention of a first pass, block by block of queries, with a backward pass of its own.

Keys after the last query of a block are skipped, which saves almost half of the work of a causal mask. The
backward pass computes the scores again from the logarithm of their normaliser, so that nothing of size T x S
is kept between the passes (the idea of FlashAttention, arXiv 2205.14135, in plain XLA).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import pairwise

import jax
import jax.numpy as jnp

from milora_jax.base.ops import Scoring, Window
from milora_jax.shapes import Array, Bool, Float
from milora_jax.types import kept

BLOCK = 64
"""Least number of queries in a block."""

MOST_BLOCKS = 8
"""More blocks would compile longer and save little: n blocks do (n + 1) / 2n of the work."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def blockwise(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    window: Window | None,
    scoring: Scoring,
) -> Float[Array, "B T N H"]:
    """``attention.attention`` in plain XLA, with any mask that respects its bounds."""
    return _forward(q, k, v, mask, window, scoring)[0]


def _blocks(length: int) -> Iterator[slice]:
    """The slices of the queries, block by block."""
    count = min(max(1, length // BLOCK), MOST_BLOCKS)
    edges = [length * i // count for i in range(count + 1)]
    yield from (slice(*pair) for pair in pairwise(edges))


def _by_head(q: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B K G T H"]:
    rows, length, heads, width = q.shape
    return q.reshape(rows, length, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)


def _by_token(x: Float[Array, "B K G T H"]) -> Float[Array, "B T N H"]:
    rows, kv_heads, group, length, width = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(rows, length, kv_heads * group, width)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _seen(mask: Array, window: Window | None, queries: slice, keys: slice) -> Bool[Array, "B 1 1 T S"]:
    mask = mask[:, queries, keys]
    return (mask if window is None else mask & window.part(queries, keys).seen())[:, None, None]


def _forward(
    q: Array, k: Array, v: Array, mask: Array, window: Window | None, scoring: Scoring
) -> tuple[Array, tuple]:
    kv_heads, before = k.shape[2], k.shape[1] - q.shape[1]
    grouped, keys, values = _by_head(q, kv_heads), k.swapaxes(1, 2), v.swapaxes(1, 2)
    outputs, normalisers = [], []
    for block in _blocks(q.shape[1]):
        seen = slice(0, before + block.stop)
        scores = scoring(_product("BKGTH,BKSH->BKGTS", grouped[:, :, :, block], keys[:, :, seen]))
        scores = jnp.where(_seen(mask, window, block, seen), scores, jnp.finfo(jnp.float32).min)
        largest = scores.max(axis=-1, keepdims=True)
        shares = jnp.exp(scores - largest)
        total = shares.sum(axis=-1, keepdims=True)
        attended = _product("BKGTS,BKSH->BKGTH", (shares / total).astype(v.dtype), values[:, :, seen])
        outputs.append(attended.astype(q.dtype))
        normalisers.append((largest + jnp.log(total))[..., 0])
    output, normaliser = kept((jnp.concatenate(outputs, axis=3), jnp.concatenate(normalisers, axis=3)))
    return _by_token(output), (grouped, keys, values, mask, window, output, normaliser)


def _backward(scoring: Scoring, residuals: tuple, gradient: Float[Array, "B T N H"]) -> tuple:
    grouped, keys, values, mask, window, output, normaliser = residuals
    slope = _by_head(gradient, keys.shape[1])
    before = keys.shape[2] - grouped.shape[3]
    of_row = (slope.astype(jnp.float32) * output.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    to_q, to_k, to_v = [], jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    for block in _blocks(grouped.shape[3]):
        seen = slice(0, before + block.stop)
        q, here = grouped[:, :, :, block], slope[:, :, :, block]
        scores = scoring(_product("BKGTH,BKSH->BKGTS", q, keys[:, :, seen]))
        masked = jnp.where(_seen(mask, window, block, seen), scores, jnp.finfo(jnp.float32).min)
        shares = jnp.exp(masked - normaliser[:, :, :, block, None])
        of_shares = _product("BKGTH,BKSH->BKGTS", here, values[:, :, seen])
        of_scores = (shares * (of_shares - of_row[:, :, :, block]) * scoring.slope(scores)).astype(q.dtype)
        to_q.append(_product("BKGTS,BKSH->BKGTH", of_scores, keys[:, :, seen]))
        to_k = to_k.at[:, :, seen].add(_product("BKGTS,BKGTH->BKSH", of_scores, q))
        to_v = to_v.at[:, :, seen].add(_product("BKGTS,BKGTH->BKSH", shares.astype(q.dtype), here))
    back = _by_token(jnp.concatenate(to_q, axis=3).astype(grouped.dtype))
    return back, *(x.astype(keys.dtype).swapaxes(1, 2) for x in (to_k, to_v)), None, None


blockwise.defvjp(_forward, _backward)
