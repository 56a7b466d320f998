"""The key-value cache: keys and values of earlier tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from milora_jax.base.cached_attention import (
    BlockMask,
    cached_attention,
    cached_attention_in_blocks,
    seen_positions,
)
from milora_jax.base.ops import Scoring
from milora_jax.shapes import Array, Bool, Float, Int

READ_BLOCK = 128
"""Cache positions that attention reads at a time where it reads as many as have been written. On a CPU larger
blocks are slower: the copies of their keys and values leave the caches of a core."""

READ_WHOLE = 512
"""The longest cache that is read at once, written or not: for one that is nearly full that is faster."""


def read_block(positions: int, platform: str) -> int:
    """Return the size of the blocks in which decode steps read a cache of some positions; 0 for all at once.

    On GPUs XLA asks the host at every turn of a loop, in every layer, so there all of it is read.
    """
    return 0 if platform == "gpu" or positions <= READ_WHOLE else READ_BLOCK


@struct.dataclass
class LayerCache:
    """Keys and values of one layer, or of all layers on a leading axis.

    Heads come before positions: a head's keys are contiguous, so that attention over them is a plain batched
    product. With the axes in the other order XLA transposes the whole cache at every step.

    Attributes:
      k, v: keys after the rotary embedding, and values, in the base's dtype. A single row may lack its axis,
        see :meth:`KVCache.squeezed`.
    """

    k: Float[Array, "*B K S H"]
    v: Float[Array, "*B K S H"]

    @classmethod
    def of(cls, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> LayerCache:
        """Make the cache of a first pass."""
        return cls(k=jnp.swapaxes(k, 1, 2), v=jnp.swapaxes(v, 1, 2))

    def padded(self, length: int) -> LayerCache:
        """Pad the cache to ``length`` cache positions."""
        widths = ((0, 0), (0, 0), (0, length - self.k.shape[2]), (0, 0))
        return LayerCache(k=jnp.pad(self.k, widths), v=jnp.pad(self.v, widths))

    def write(
        self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], place: Int[Array, " B"]
    ) -> LayerCache:
        """Write T new entries from each row's ``place`` on, and return the cache.

        An entry beyond the last cache position is dropped.
        """
        rows = jnp.arange(k.shape[0])[:, None]
        positions = place[:, None] + jnp.arange(k.shape[1])[None, :]

        def put(cache: Array, new: Array) -> Array:
            new = new.astype(cache.dtype)
            if cache.ndim == 3:
                where, new = cache.at[:, positions[0]], jnp.swapaxes(new[0], 0, 1)
            else:
                where = cache.at[rows, :, positions]
            return where.set(new, mode="drop", unique_indices=True, indices_are_sorted=True)

        return LayerCache(k=put(self.k, k), v=put(self.v, v))

    def attend(
        self, q: Float[Array, "B T N H"], mask: Bool[Array, "B T S"] | BlockMask, scoring: Scoring
    ) -> Float[Array, "B T N H"]:
        """Attention of new queries over the cache."""
        if isinstance(mask, BlockMask):
            return cached_attention_in_blocks(q, self.k, self.v, mask, scoring)
        return cached_attention(q, ((self.k, self.v, mask),), scoring)


@struct.dataclass
class SlotLayerCache:
    """One row of a layer's cache, which a pass of that row alone reads and writes in place.

    Attributes:
      whole: the cache of all rows.
      row: the row.
    """

    whole: LayerCache
    row: Int[Array, ""]

    def write(
        self, k: Float[Array, "1 T K H"], v: Float[Array, "1 T K H"], place: Int[Array, " 1"]
    ) -> SlotLayerCache:
        """Write T new entries from ``place`` on, all of which the cache must have, and return the cache."""

        def put(cache: Array, new: Array) -> Array:
            new = jnp.swapaxes(new, 1, 2).astype(cache.dtype)
            return jax.lax.dynamic_update_slice(cache, new, (self.row, 0, place[0], 0))

        whole = LayerCache(k=put(self.whole.k, k), v=put(self.whole.v, v))
        return dataclasses.replace(self, whole=whole)

    def attend(
        self, q: Float[Array, "1 T N H"], mask: BlockMask, scoring: Scoring
    ) -> Float[Array, "1 T N H"]:
        """Attention of new queries over the row."""
        return cached_attention_in_blocks(q, self.whole.k, self.whole.v, mask, scoring, self.row)


@struct.dataclass
class KVCache:
    """The cache of a batch. A token's cache position is its place in its row, independent of other rows.

    Attributes:
      layers: a tuple of one LayerCache per layer (decoding), or one stacked LayerCache.
      length: cache positions that each row has written, a method's prefix included. A row that has written
        all of them has ended, and a pass neither writes into it nor reads what it alone has written.
      block: cache positions that attention reads at a time, of which it reads as many blocks as rows have
        written; 0 reads all of the cache at once.
    """

    layers: tuple[LayerCache, ...] | LayerCache
    length: Int[Array, " B"]
    block: int = struct.field(pytree_node=False, default=0)

    def squeezed(self) -> KVCache:
        """The cache of a single row without its row axis; other caches unchanged.

        Inside a scan XLA (jaxlib 0.10.2, CPU) copies a cache with an axis of 1 three times per step: it drops
        the axis for the product but not for the carry, and then cannot write in place.
        """
        return _squeezed(self)

    def unsqueezed(self) -> KVCache:
        """The inverse of :meth:`squeezed`."""
        return _unsqueezed(self)

    @property
    def place(self) -> Int[Array, " B"]:
        """The cache position of each row at which the next pass writes."""
        return self.length

    @property
    def reach(self) -> int:
        """The most cache positions that a query may see; a window of this width hides nothing."""
        return jax.tree.leaves(self.layers)[0].shape[-2]

    def mask(self, queries: int, window: int | None = None) -> Bool[Array, "B T S"] | BlockMask:
        """Which cache positions the T queries of the next pass see: earlier ones, and their own.

        Args:
          window: number of most recent positions that are seen; None for all.
        """
        last = self.length[:, None] + jnp.arange(queries)[None, :]
        if not self.block:
            return seen_positions(last, jnp.arange(self.reach), window)
        size, running = min(self.block, self.reach), self.length < self.reach
        written = jnp.where(running, self.length + queries, 1).max()
        oldest = jnp.where(running, self.length + 1 - (window or self.reach), self.reach).min()
        first = jnp.clip(oldest, 0, written - 1) // size
        end = -(-jnp.minimum(written, self.reach) // size)
        return BlockMask(last=last, first=first, end=end, size=size, window=window)

    def after(self, layers: Any, queries: int) -> KVCache:
        """The cache after a pass."""
        return dataclasses.replace(self, layers=layers, length=self.length + queries)


@struct.dataclass
class BeamLayerCache:
    """Keys and values of one layer, for several beams of each prompt.

    A prompt's entries are stored once. A beam's entry is written at its own place and never moves; beams that
    change their parents change the mask. A query's product covers the new entries of all beams of its prompt,
    and the mask selects those of its ancestors. That reads no more than a beam's own entries would, because
    all beams of a prompt are one product.

    Attributes:
      prompt: cache of the prompts.
      k, v: entries of the beams' new tokens, a cache position per beam and step. A single prompt may lack its
        axis, as in :class:`LayerCache`.
    """

    prompt: LayerCache
    k: Float[Array, "*P K own H"]
    v: Float[Array, "*P K own H"]

    def write(
        self, k: Float[Array, "B 1 K H"], v: Float[Array, "B 1 K H"], place: tuple[int, Int[Array, ""]]
    ) -> BeamLayerCache:
        """Write every beam's new entry, and return the cache.

        Args:
          place: cache positions of a beam, and the one to write.
        """
        steps, step = place
        beams = self.k.shape[-2] // steps
        positions = steps * jnp.arange(beams) + step

        def put(cache: Array, new: Array) -> Array:
            new = new.reshape(-1, beams, *new.shape[2:]).swapaxes(1, 2).astype(cache.dtype)
            where = cache.at[:, positions] if cache.ndim == 3 else cache.at[:, :, positions]
            return where.set(
                new[0] if cache.ndim == 3 else new,
                mode="promise_in_bounds",
                unique_indices=True,
                indices_are_sorted=True,
            )

        return dataclasses.replace(self, k=put(self.k, k), v=put(self.v, v))

    def attend(
        self,
        q: Float[Array, "B 1 N H"],
        mask: tuple[Bool[Array, "P beams S"], Bool[Array, "P beams own"]],
        scoring: Scoring,
    ) -> Float[Array, "B 1 N H"]:
        """Attention of every beam's new query over its prompt and its ancestors."""
        prompts, beams, _ = mask[0].shape
        by_prompt = q.reshape(prompts, beams, *q.shape[2:])
        of_prompt = (self.prompt.k, self.prompt.v, mask[0])
        parts = (of_prompt, (self.k, self.v, mask[1]))
        return cached_attention(by_prompt, parts, scoring).reshape(q.shape)


@struct.dataclass
class BeamCache:
    """The cache of beam search; rows are beams, and the beams of a prompt are adjacent.

    Attributes:
      length: cache positions that each prompt has written, a method's prefix included.
      step: number of tokens that every beam has added.
      ancestry: the beam of the prompt that added the token of each step of a beam.
    """

    layers: tuple[BeamLayerCache, ...]
    length: Int[Array, " P"]
    step: Int[Array, ""]
    ancestry: Int[Array, "P beams steps"]

    @classmethod
    def of(cls, cache: KVCache, beams: int, steps: int) -> BeamCache:
        """Build it from the cache of prompts, with room for ``steps`` tokens of each beam."""
        layers = []
        if isinstance(cache.layers, LayerCache):
            raise ValueError("beams need the cache of unrolled layers")
        for layer in cache.layers:
            prompts, kv_heads, _, width = layer.k.shape
            empty = jnp.zeros((prompts, kv_heads, beams * steps, width), layer.k.dtype)
            layers.append(BeamLayerCache(prompt=layer, k=empty, v=jnp.zeros_like(empty)))
        return cls(
            layers=tuple(layers),
            length=cache.length,
            step=jnp.zeros((), jnp.int32),
            ancestry=jnp.zeros((cache.length.shape[0], beams, steps), jnp.int32),
        )

    def squeezed(self) -> BeamCache:
        """The cache of a single prompt without its axis, as in :meth:`KVCache.squeezed`."""
        return _squeezed(self)

    def unsqueezed(self) -> BeamCache:
        """The inverse of :meth:`squeezed`."""
        return _unsqueezed(self)

    @property
    def place(self) -> tuple[int, Int[Array, ""]]:
        """The place at which the next pass writes."""
        return self.ancestry.shape[-1], self.step

    @property
    def reach(self) -> int:
        """The most cache positions that a beam's query may see; a window of this width hides nothing."""
        return self.layers[0].prompt.k.shape[-2] + self.ancestry.shape[-1]

    def mask(
        self, queries: int, window: int | None = None
    ) -> tuple[Bool[Array, "P beams S"], Bool[Array, "P beams own"]]:
        """What each beam's next query sees of its prompt, and of the new tokens of all beams.

        Args:
          window: number of most recent tokens of its own past that it sees; None for all.

        Raises:
          ValueError: there is more than one query; beams advance token by token.
        """
        if queries != 1:
            raise ValueError(f"beams advance token by token, not {queries} at a time")
        prompts, beams, steps = self.ancestry.shape
        length = self.layers[0].prompt.k.shape[-2]
        of_prompt = jnp.arange(length)[None, None, :] < self.length[:, None, None]
        mine = self.ancestry[:, :, None, :] == jnp.arange(beams)[None, None, :, None]
        past = self.step - jnp.arange(steps)[None, None, None, :]
        of_beams = mine & (past >= 0)
        if window is not None:
            last = self.length[:, None, None] + self.step
            of_prompt &= last - jnp.arange(length)[None, None, :] < window
            of_beams &= past < window
        return (
            jnp.broadcast_to(of_prompt, (prompts, beams, length)),
            of_beams.reshape(prompts, beams, beams * steps),
        )

    def after(self, layers: Any, queries: int) -> BeamCache:
        """The cache after a pass."""
        return dataclasses.replace(self, layers=layers, step=self.step + queries)


def _squeezed(cache: Any) -> Any:
    if cache.length.shape[0] != 1:
        return cache
    return dataclasses.replace(cache, layers=jax.tree.map(lambda leaf: leaf[0], cache.layers))


def _unsqueezed(cache: Any) -> Any:
    if cache.length.shape[0] != 1:
        return cache
    return dataclasses.replace(cache, layers=jax.tree.map(lambda leaf: leaf[None], cache.layers))
