"""NEFTune: uniform noise on the embeddings of training tokens (Jain et al. 2023, arXiv 2310.05914)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from milora_jax.shapes import Array, Float, Key
from milora_jax.types import Batch

NOISE = 0x4E4546
"""Folded into a step's key, whose other numbers, those of layers, are small."""


def embedding_noise(batch: Batch, width: int, alpha: float, key: Key[Array, ""]) -> Float[Array, "B T D"]:
    """Noise for the embeddings: uniform up to ``alpha / sqrt(L D)``, and zero on padding.

    Args:
      width: D.
      alpha: size of the noise. The expected norm over an example is ``alpha / sqrt(3)`` at any length.
      key: random key of the step.

    Returns:
      The noise in float32, where L is the number of tokens of a token's own example: those of its segment,
      not of a row that holds several, and without padding.
    """
    of_segment = jax.nn.one_hot(batch.segment_ids, batch.prompts + 1).sum(axis=1)
    lengths = jnp.take_along_axis(of_segment, batch.segment_ids, axis=1, mode="clip")
    bound = jnp.where(batch.segment_ids > 0, alpha / jnp.sqrt(lengths * width), 0.0)
    shape = (*batch.tokens.shape, width)
    drawn = jax.random.uniform(jax.random.fold_in(key, NOISE), shape, jnp.float32, -1.0, 1.0)
    return bound[..., None] * drawn
