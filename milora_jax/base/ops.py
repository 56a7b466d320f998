"""The maths of a decoder layer as free functions, which know nothing of adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from milora_jax.model_config import LinearScaling, Llama3Scaling
from milora_jax.shapes import Array, Bool, Float, Int


def rms_norm(
    x: Float[Array, "*B D"], weight: Float[Array, " D"], eps: float, unit_offset: bool
) -> Float[Array, "*B D"]:
    """Root-mean-square norm; the mean of squares is in float32.

    Published bfloat16 checkpoints depend on the order of cast and product; it is Hugging Face's.

    Args:
      unit_offset: multiply by ``1 + weight`` in float32, as Gemma does, instead of by weight in x's dtype.
    """
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    if unit_offset:
        return (wide * jnp.broadcast_to(1.0 + weight.astype(jnp.float32), x.shape)).astype(x.dtype)
    return wide.astype(x.dtype) * jnp.broadcast_to(weight, x.shape)


def softcap(x: Float[Array, "*B"], cap: float | None) -> Float[Array, "*B"]:
    """``cap * tanh(x / cap)``, which stays below the cap (Gemma 2); None returns ``x``."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def softcap_slope(capped: Float[Array, "*B"], cap: float | None) -> Float[Array, "*B"] | float:
    """The derivative of :func:`softcap`, computed from its result."""
    return 1.0 if cap is None else 1.0 - (capped / cap) ** 2


@dataclass(frozen=True)
class Scoring:
    """The conversion of the product of a query and a key to a score.

    Attributes:
      scale: factor of the product.
      cap: cap of :func:`softcap`, which is applied afterwards.
    """

    scale: float
    cap: float | None

    def __call__(self, products: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """Convert products to scores."""
        return softcap(products * self.scale, self.cap)

    def slope(self, scores: Float[Array, "*B"]) -> Float[Array, "*B"] | float:
        """The derivative with respect to the products, computed from the scores."""
        return self.scale * softcap_slope(scores, self.cap)


def rope_frequencies(
    head_dim: int, theta: float, scaling: Llama3Scaling | LinearScaling | None
) -> np.ndarray:
    """Inverse wavelengths of the rotary embedding in radians per position, float32 ``[H / 2]``.

    With a scaling, all frequencies are divided by ``factor``; LLaMA 3.1, which stretches its context so,
    divides only the low ones and blends a band between.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / np.power(np.float32(theta), exponent)).astype(np.float32)
    if scaling is None:
        return frequencies
    if isinstance(scaling, LinearScaling):
        return frequencies / np.float32(scaling.factor)
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

    bfloat16 would be wrong: it cannot tell position 256 from 257.
    """
    angles = jnp.einsum("BT,H->BTH", positions.astype(jnp.float32), jnp.asarray(frequencies))
    return jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]


def apply_rope(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T 1 half"], sin: Float[Array, "B T 1 half"]
) -> Float[Array, "B T N H"]:
    """Rotate the first half of each head against the second (the Hugging Face layout)."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = (jnp.broadcast_to(table.astype(x.dtype), first.shape) for table in (cos, sin))
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def gated(gate: Float[Array, "*B F"], up: Float[Array, "*B F"], activation: str) -> Float[Array, "*B F"]:
    """``act(gate) * up``: SwiGLU or GeGLU, by one of ``model_config.GATE_ACTIVATIONS``."""
    if activation == "silu":
        return jax.nn.silu(gate) * up
    return jax.nn.gelu(gate, approximate=True) * up


class Window(NamedTuple):
    """A sliding window: whether a key is near enough to a query to be seen.

    Attributes:
      queries, keys: positions within their records; a prefix has negative positions from ``-P`` on.
      size: number of tokens that a query sees, itself included; an array in a scan over layers.
    """

    queries: Int[Array, "B T"]
    keys: Int[Array, "B S"]
    size: int | Int[Array, ""]

    def part(self, queries: slice, keys: slice) -> Window:
        """The window of some of the queries and keys."""
        return Window(self.queries[:, queries], self.keys[:, keys], self.size)

    def seen(self) -> Bool[Array, "B T S"]:
        """Whether a query is near enough to a key, which must not be after it."""
        return self.queries[:, :, None] - self.keys[:, None, :] < self.size


def attention_mask(
    query_segments: Int[Array, "B T"], key_segments: Int[Array, "B S"], first_query: int
) -> Bool[Array, "B T S"]:
    """A causal mask within segments: a query sees the keys of its own record that are not after it.

    Args:
      query_segments, key_segments: 0 for padding, which no query sees.
      first_query: place of the first query among the keys.
    """
    query_slots = first_query + jnp.arange(query_segments.shape[1])
    causal = query_slots[:, None] >= jnp.arange(key_segments.shape[1])[None, :]
    same = query_segments[:, :, None] == key_segments[:, None, :]
    return same & causal[None, :, :] & (key_segments > 0)[:, None, :]
