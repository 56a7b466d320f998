"""The maths of a LLaMA layer as free functions; nothing here knows that adapters exist."""

from __future__ import annotations

from itertools import accumulate

import jax
import jax.numpy as jnp
import numpy as np

from milora_jax.config import Llama3Scaling
from milora_jax.shapes import Array, Bool, Float, Int


def rms_norm(x: Float[Array, "*B D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "*B D"]:
    """Root-mean-square norm; the mean of squares in float32, the product with weight in x's dtype.

    The order of cast and product is the one of Hugging Face's LlamaRMSNorm, on which published
    bfloat16 checkpoints depend.
    """
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * jnp.broadcast_to(weight, x.shape)


def rope_frequencies(head_dim: int, theta: float, scaling: Llama3Scaling | None) -> np.ndarray:
    """Inverse wavelengths of the rotary embedding in radians per position, float32 ``[H / 2]``.

    With ``scaling`` the low frequencies are divided by ``factor`` and a band between is blended, as
    LLaMA 3.1 does to stretch its context.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / np.power(np.float32(theta), exponent)).astype(np.float32)
    if scaling is None:
        return frequencies
    wavelength = 2 * np.pi / frequencies
    original = scaling.original_max_positions
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    return blended.astype(np.float32)


def rope_tables(
    positions: Int[Array, "B T"], frequencies: np.ndarray
) -> tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]:
    """Cosine and sine of every position's angles, in float32.

    Never in bfloat16: it cannot tell position 256 from 257.
    """
    angles = jnp.einsum("BT,H->BTH", positions.astype(jnp.float32), jnp.asarray(frequencies))
    return jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]


def apply_rope(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T 1 half"], sin: Float[Array, "B T 1 half"]
) -> Float[Array, "B T N H"]:
    """Rotate each head's first and second half against each other (the Hugging Face layout)."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = (jnp.broadcast_to(table.astype(x.dtype), first.shape) for table in (cos, sin))
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def cached_attention(
    q: Float[Array, "B T N H"],
    parts: tuple[tuple[Float[Array, "*B K _ H"], Float[Array, "*B K _ H"], Bool[Array, "B T _"]], ...],
) -> Float[Array, "B T N H"]:
    """``attention.attention`` over caches, whose heads come before their slots.

    Rows and heads stay two axes: made one, heads that are spread over devices would be gathered, and the
    whole cache with them, at every token.

    Args:
      parts: keys, values and masks, over all of which together the softmax goes.
    """
    rows, length, heads, width = q.shape
    kv_heads = parts[0][0].shape[-3]
    group = heads // kv_heads
    grouped = q.reshape(rows, length, kv_heads, group, width).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(rows, kv_heads, group * length, width)

    def by_row(cache: Array) -> Array:
        return cache.reshape(rows, kv_heads, -1, width)

    def scores_of(k: Array, mask: Array) -> Array:
        scores = jnp.einsum("BKTH,BKSH->BKTS", grouped, by_row(k), preferred_element_type=jnp.float32)
        seen = jnp.broadcast_to(mask[:, None, None], (rows, kv_heads, group, length, mask.shape[-1]))
        scores = scores * (width**-0.5)
        return jnp.where(seen.reshape(scores.shape), scores, jnp.finfo(jnp.float32).min)

    scores = [scores_of(k, mask) for k, _, mask in parts]
    edges = list(accumulate(part.shape[-1] for part in scores))[:-1]
    shares = jnp.split(jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1), edges, axis=-1)
    attended = sum(
        jnp.einsum("BKTS,BKSH->BKTH", share.astype(v.dtype), by_row(v))
        for share, (_, v, _) in zip(shares, parts, strict=True)
    )
    attended = jnp.asarray(attended).reshape(rows, kv_heads, group, length, width)
    return attended.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def swiglu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """``silu(gate) * up``, the gated unit of LLaMA."""
    return jax.nn.silu(gate) * up


def attention_mask(
    query_segments: Int[Array, "B T"], key_segments: Int[Array, "B S"], first_query: int
) -> Bool[Array, "B T S"]:
    """Causal within a segment: a query sees the keys of its own record that are not after it.

    Args:
      query_segments, key_segments: 0 for padding, which nothing sees.
      first_query: place of the first query among the keys.
    """
    query_slots = first_query + jnp.arange(query_segments.shape[1])
    causal = query_slots[:, None] >= jnp.arange(key_segments.shape[1])[None, :]
    same = query_segments[:, :, None] == key_segments[:, None, :]
    return same & causal[None, :, :] & (key_segments > 0)[:, None, :]
