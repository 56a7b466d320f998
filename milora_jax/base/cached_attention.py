"""Attention over a cache of keys and values: all of it at once, or block by block as far as it is written."""

from __future__ import annotations

from itertools import accumulate

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from milora_jax.base.ops import Scoring
from milora_jax.shapes import Array, Bool, Float, Int

LOWEST = float(np.finfo(np.float32).min)
"""The score of what is not seen."""


def cached_attention(
    q: Float[Array, "B T N H"],
    parts: tuple[tuple[Float[Array, "*B K _ H"], Float[Array, "*B K _ H"], Bool[Array, "B T _"]], ...],
    scoring: Scoring,
) -> Float[Array, "B T N H"]:
    """``attention.attention`` over caches, whose heads come before their cache positions.

    Rows and heads stay two axes: merged, heads that are spread over devices would be gathered at every token,
    and the whole cache with them.

    Args:
      parts: keys, values and masks, over all of which the softmax is taken together.
    """
    rows, length, heads, width = q.shape
    kv_heads = parts[0][0].shape[-3]
    group = heads // kv_heads
    grouped = _by_kv_head(q, kv_heads)

    def by_row(cache: Array) -> Array:
        return cache.reshape(rows, kv_heads, -1, width)

    def scores_of(k: Array, mask: Array) -> Array:
        products = jnp.einsum("BKTH,BKSH->BKTS", grouped, by_row(k), preferred_element_type=jnp.float32)
        seen = jnp.broadcast_to(mask[:, None, None], (rows, kv_heads, group, length, mask.shape[-1]))
        scores = scoring(products)
        return jnp.where(seen.reshape(scores.shape), scores, LOWEST)

    scores = [scores_of(k, mask) for k, _, mask in parts]
    edges = list(accumulate(part.shape[-1] for part in scores))[:-1]
    shares = jnp.split(jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1), edges, axis=-1)
    attended = sum(
        jnp.einsum("BKTS,BKSH->BKTH", share.astype(v.dtype), by_row(v))
        for share, (_, v, _) in zip(shares, parts, strict=True)
    )
    return _by_query(jnp.asarray(attended), q)


@struct.dataclass
class BlockMask:
    """Which cache positions queries see, for attention that reads a cache block by block.

    Attributes:
      last: the last cache position that each query sees.
      first, end: the blocks from ``first`` to before ``end`` hold everything that a query sees.
      size: cache positions of a block, at most those of the cache.
      window: number of most recent positions that are seen; None for all.
    """

    last: Int[Array, "B T"]
    first: Int[Array, ""]
    end: Int[Array, ""]
    size: int = struct.field(pytree_node=False)
    window: int | None = struct.field(pytree_node=False)


def seen_positions(
    last: Int[Array, "B T"], positions: Int[Array, " S"], window: int | None
) -> Bool[Array, "B T S"]:
    """Which of some cache positions queries see.

    Args:
      last: the last position that each query sees.
      window: number of most recent positions that are seen; None for all.
    """
    last, positions = last[:, :, None], positions[None, None, :]
    seen = positions <= last
    return seen if window is None else seen & (last - positions < window)


def cached_attention_in_blocks(
    q: Float[Array, "B T N H"],
    k: Float[Array, "*R K S H"],
    v: Float[Array, "*R K S H"],
    mask: BlockMask,
    scoring: Scoring,
    row: Int[Array, ""] | int = 0,
) -> Float[Array, "B T N H"]:
    """:func:`cached_attention` of the part of a cache that has been written, in a loop over its blocks.

    The softmax is accumulated (Milakov and Gimelshein, arXiv 1805.02867). A block of which a row sees nothing
    changes no bit of that row, so a row's result does not depend on how far others make the loop go.

    Args:
      k, v: cache of R rows, or of one without its axis.
      row: row of the cache that the first of the B rows reads.
    """
    kv_heads, positions, width = k.shape[-3:]
    rows, length, heads, _ = q.shape
    grouped, size = _by_kv_head(q, kv_heads), mask.size

    def part(cache: Array, begin: Array) -> Array:
        if cache.ndim == 3:
            return jax.lax.dynamic_slice_in_dim(cache, begin, size, axis=1)[None]
        return jax.lax.dynamic_slice(cache, (row, 0, begin, 0), (rows, kv_heads, size, width))

    def add_block(number: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        largest, total, attended = carry
        start = number * size
        begin = jnp.minimum(start, positions - size)  # the last block may overlap the one before it
        places = begin + jnp.arange(size)
        seen = jnp.broadcast_to(
            (seen_positions(mask.last, places, mask.window) & (places >= start)[None, None])[:, None, None],
            (rows, kv_heads, heads // kv_heads, length, size),
        ).reshape(rows, kv_heads, -1, size)
        products = jnp.einsum("BKTH,BKSH->BKTS", grouped, part(k, begin), preferred_element_type=jnp.float32)
        scores = jnp.where(seen, scoring(products), LOWEST)
        new_largest = jnp.maximum(largest, scores.max(axis=-1))
        shares = jnp.where(seen, jnp.exp(scores - new_largest[..., None]), 0.0)
        kept = jnp.exp(largest - new_largest)
        # Values that no query sees may be what an earlier request has left, and 0 times a value that is not
        # finite is not 0.
        seen_by_any = (places[None] <= mask.last.max(axis=1, keepdims=True))[:, None, :, None]
        values = jnp.where(seen_by_any, part(v, begin), jnp.zeros((), v.dtype))
        added = jnp.einsum(
            "BKTS,BKSH->BKTH", shares.astype(v.dtype), values, preferred_element_type=jnp.float32
        )
        return new_largest, total * kept + shares.sum(axis=-1), attended * kept[..., None] + added

    nothing = jnp.zeros(grouped.shape[:-1], jnp.float32)
    start = nothing + LOWEST, nothing, jnp.zeros(grouped.shape, jnp.float32)
    _, total, attended = jax.lax.fori_loop(mask.first, mask.end, add_block, start)
    # A query that sees nothing gets 0.
    attended = attended / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
    return _by_query(attended.astype(v.dtype), q)


def _by_kv_head(q: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B K GT H"]:
    """Queries by the head of the keys that they read."""
    rows, length, heads, width = q.shape
    grouped = q.reshape(rows, length, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)
    return grouped.reshape(rows, kv_heads, -1, width)


def _by_query(attended: Float[Array, "B K GT H"], q: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """The inverse of :func:`_by_kv_head` for what was attended."""
    rows, kv_heads, _, width = attended.shape
    by_head = attended.reshape(rows, kv_heads, -1, q.shape[1], width)
    return by_head.transpose(0, 3, 1, 2, 4).reshape(q.shape)
