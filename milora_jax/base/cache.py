"""Keys and values of the tokens seen so far."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from milora_jax.config import ModelConfig
from milora_jax.shapes import Array, Float, Int


@struct.dataclass
class LayerCache:
    """Keys and values of one layer, or of all layers on a leading axis.

    Attributes:
      k, v: after the rotary embedding, in the base's dtype.
    """

    k: Float[Array, "*L B S K H"]
    v: Float[Array, "*L B S K H"]

    def write(
        self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], slot: Int[Array, ""]
    ) -> LayerCache:
        """This layer's cache with T new entries at ``slot``."""
        start = (0, slot, 0, 0)
        return LayerCache(
            k=jax.lax.dynamic_update_slice(self.k, k.astype(self.k.dtype), start),
            v=jax.lax.dynamic_update_slice(self.v, v.astype(self.v.dtype), start),
        )


@struct.dataclass
class KVCache:
    """The cache of a batch. All rows write at the same slot; padding slots carry segment 0.

    Attributes:
      layers: a tuple of one LayerCache per layer (decoding), or one stacked LayerCache.
      segment_ids: which slots hold a token, and of which record.
      length: slots written so far.
    """

    layers: tuple[LayerCache, ...] | LayerCache
    segment_ids: Int[Array, "B S"]
    length: Int[Array, ""]


def empty_cache(config: ModelConfig, rows: int, slots: int, dtype: jnp.dtype) -> KVCache:
    """An empty cache in the per-layer layout, in which decoding updates it in place."""
    shape = (rows, slots, config.num_kv_heads, config.head_dim)
    layers = tuple(
        LayerCache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype)) for _ in range(config.num_layers)
    )
    return KVCache(
        layers=layers,
        segment_ids=jnp.zeros((rows, slots), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )
