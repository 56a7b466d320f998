"""Attention masks, windows and rotary tables of a pass, for sliding-window layers and for others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from milora_jax.base import ops
from milora_jax.base.cache import BeamCache, KVCache
from milora_jax.model_config import ModelConfig
from milora_jax.shapes import Array
from milora_jax.types import Batch, PyTree


@dataclass(frozen=True)
class AttentionContext:
    """What attention needs beside queries, keys and values, for both kinds of layers.

    Attributes:
      mask: the attention mask of full-attention layers: ``[B, T, S]`` in a first pass, the cache's in a later
        one.
      local_mask: the mask of sliding-window layers in a later pass.
      near: the window of sliding-window layers in a first pass; None where it is wider than the rows.
      tables: cosine and sine of the rotary embedding.
      local_tables: the same for sliding-window layers.
    """

    mask: Any
    local_mask: Any
    near: ops.Window | None
    tables: tuple[Array, Array]
    local_tables: tuple[Array, Array] | None

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        batch: Batch,
        prefix_length: int,
        cache: KVCache | BeamCache | None,
    ) -> AttentionContext:
        """Build the context of a pass; the arguments are those of ``transformer.forward``.

        Args:
          prefix_length: P, in a first pass.
        """
        positions, segment_ids = batch.positions, batch.segment_ids
        frequencies = ops.rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        tables, local_tables = ops.rope_tables(positions, frequencies), None
        if config.local_rope_theta is not None:
            frequencies = ops.rope_frequencies(config.head_dim, config.local_rope_theta, None)
            local_tables = ops.rope_tables(positions, frequencies)
        size = config.sliding_window if any(config.slides) else None
        rows, length = positions.shape
        if cache is not None:
            hides = size is not None and size < cache.reach
            mask = cache.mask(length)
            return cls(mask, cache.mask(length, size) if hides else mask, None, tables, local_tables)

        def of_prefix(values: Array) -> Array:
            return jnp.broadcast_to(values.astype(jnp.int32)[None], (rows, values.size))

        owners = of_prefix(jnp.repeat(jnp.arange(1, batch.segments + 1), prefix_length))
        mask = ops.attention_mask(
            segment_ids, jnp.concatenate([owners, segment_ids], axis=1), owners.shape[1]
        )
        near = None
        if size is not None and size < prefix_length + length:
            places = of_prefix(jnp.tile(jnp.arange(-prefix_length, 0), batch.segments))
            near = ops.Window(positions, jnp.concatenate([places, positions], axis=1), size)
        return cls(mask, mask, near, tables, local_tables)

    def angles(self, sliding: bool | Array) -> tuple[Array, Array]:
        """Cosine and sine of the rotary embedding in a layer."""
        return self.tables if self.local_tables is None else _choose(sliding, self.local_tables, self.tables)

    def cached(self, sliding: bool | Array) -> Any:
        """The mask of a later pass in a layer."""
        return self.mask if self.local_mask is self.mask else _choose(sliding, self.local_mask, self.mask)

    def window(self, sliding: bool | Array) -> ops.Window | None:
        """The window of a first pass in a layer; None where the layer has none."""
        if self.near is None or sliding is False:
            return None
        if sliding is True:
            return self.near
        return self.near._replace(size=jnp.where(sliding, self.near.size, jnp.iinfo(jnp.int32).max))


def _choose(sliding: bool | Array, local: PyTree, whole: PyTree) -> PyTree:
    """The value for a layer: chosen at once where the layer's kind is known, else inside the scan."""
    if isinstance(sliding, bool):
        return local if sliding else whole
    return jax.tree.map(lambda a, b: jnp.where(sliding, a, b), local, whole)


def scoring_of(config: ModelConfig) -> ops.Scoring:
    """The conversion of a model's products to scores."""
    return ops.Scoring(config.score_scale, config.attention_softcap)
