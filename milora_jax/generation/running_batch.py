"""The running batch, in whose rows prompts are prefilled, and blocks of keys and values cut and pasted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from milora_jax.base.attention import DeviceLayout
from milora_jax.base.cache import LayerCache
from milora_jax.generation.decode_state import DecodeState, by_head, with_layers
from milora_jax.shapes import Array, Float, Int


class RunningBatch:
    """The state of the batch: every program consumes it, and what the program returns takes its place.

    Args:
      empty: makes the state of a batch whose rows are all free.
      layout: device layout of the state.
    """

    def __init__(self, empty: Callable[[], DecodeState], layout: DeviceLayout | None) -> None:
        self.layout, self._empty = layout, empty
        self.clear()

    def clear(self) -> None:
        """Free all rows."""
        state = self._empty()
        # Committed to their devices, as what programs return is: a state that is not has programs of its own.
        self.state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, state))

    @property
    def layers(self) -> list[LayerCache]:
        """The keys and values of each layer, which a program may consume."""
        layers = self.state.cache.layers
        if isinstance(layers, LayerCache):
            raise AssertionError("a running batch has the layers of the decode layout")
        return list(layers)

    def put_layer(self, index: int, cache: LayerCache) -> None:
        """Put new keys and values of a layer into the place of the consumed ones."""
        layers = self.layers
        layers[index] = cache
        self._put(layers)

    def _put(self, layers: Sequence[LayerCache]) -> None:
        self.state = with_layers(self.state, tuple(layers))

    def cut(self, row: int, starts: Sequence[int], size: int) -> tuple[Any, ...]:
        """Return the keys and values of blocks of a row."""
        return tuple(cut_block(self.layers, np.int32(row), np.int32(start), size) for start in starts)

    def paste(self, row: int, blocks: Sequence[Any]) -> None:
        """Write blocks into a row, from its beginning on."""
        start = 0
        for block in blocks:
            self._put(paste_block(self.layers, block, np.int32(row), np.int32(start), self.layout))
            start += block.shape[3]

    def make_ready(self, row: int) -> None:
        """Make a row ready for another prompt, whose prefill writes only as far as the prompt goes.

        Attention in blocks takes nothing of values that no query sees. Attention over the whole row
        multiplies them by 0, and what an earlier request has left need not be finite: it is erased.
        """
        if not self.state.cache.block:
            self._put(erase_row(self.layers, np.int32(row), self.layout))

    def copy(self, source: int, target: int) -> None:
        """Copy the keys and values of a row to another one."""
        self._put(copy_row(self.layers, np.int32(source), np.int32(target), self.layout))


@functools.partial(jax.jit, static_argnames="size")
def cut_block(
    layers: list[LayerCache], row: Int[Array, ""], start: Int[Array, ""], size: int
) -> Float[Array, "L 2 K T H"]:
    """Return the keys and values of one block of a row in all layers."""

    def cut(leaf: Array) -> Array:
        _, heads, _, width = leaf.shape
        return jax.lax.dynamic_slice(leaf, (row, 0, start, 0), (1, heads, size, width))[0]

    return jnp.stack([jnp.stack([cut(layer.k), cut(layer.v)]) for layer in layers])


@functools.partial(jax.jit, static_argnames="layout", donate_argnames="layers")
def paste_block(
    layers: list[LayerCache],
    block: Float[Array, "L 2 K T H"],
    row: Int[Array, ""],
    start: Int[Array, ""],
    layout: DeviceLayout | None,
) -> list[LayerCache]:
    """Return the keys and values with the block that :func:`cut_block` returned in its place."""

    def paste(leaf: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice(leaf, new[None], (row, 0, start, 0))

    pasted = [
        LayerCache(k=paste(layer.k, new[0]), v=paste(layer.v, new[1]))
        for layer, new in zip(layers, block, strict=True)
    ]
    return by_head(pasted, layout)


@functools.partial(jax.jit, static_argnames="layout", donate_argnames="layers")
def copy_row(
    layers: list[LayerCache],
    source: Int[Array, ""],
    target: Int[Array, ""],
    layout: DeviceLayout | None,
) -> list[LayerCache]:
    """Return the keys and values with those of one row in another one too."""

    def copied(leaf: Array) -> Array:
        row = jax.lax.dynamic_slice_in_dim(leaf, source, 1)
        return jax.lax.dynamic_update_slice_in_dim(leaf, row, target, 0)

    return by_head(jax.tree.map(copied, layers), layout)


@functools.partial(jax.jit, static_argnames="layout", donate_argnames="layers")
def erase_row(layers: list[LayerCache], row: Int[Array, ""], layout: DeviceLayout | None) -> list[LayerCache]:
    """Return the keys and values with zeros in one row."""

    def erased(leaf: Array) -> Array:
        nothing = jnp.zeros((1, *leaf.shape[1:]), leaf.dtype)
        return jax.lax.dynamic_update_slice_in_dim(leaf, nothing, row, 0)

    return by_head(jax.tree.map(erased, layers), layout)
