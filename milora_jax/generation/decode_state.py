"""The carry of the decode scan: what the running batch consists of, and how it is laid out over devices."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding

from milora_jax.base.attention import DeviceLayout
from milora_jax.base.cache import KVCache, LayerCache
from milora_jax.generation.prompt_lookup import PromptLookup
from milora_jax.generation.sampling import Sampler
from milora_jax.model_config import ModelConfig
from milora_jax.shapes import Array, Bool, Float, Int
from milora_jax.types import PyTree


@struct.dataclass
class DecodeState:
    """The carry of the decode scan.

    Attributes:
      token: the last token of each row, not yet run through the model.
      position: its position within the row's text.
      done: rows that have ended or are free.
      cache: keys and values of everything before ``token``.
      route: routing weights of each layer, computed by ``prefill`` and never written by a step; None
        without a router.
      adapter_slot: slot of each row's adapter in the bank.
      sampler: each row's settings.
      lookup: the rows' texts, for prompt look-up; None without it.
    """

    token: Int[Array, " B"]
    position: Int[Array, " B"]
    done: Bool[Array, " B"]
    cache: KVCache
    route: tuple[Float[Array, "B 1 E"], ...] | None
    adapter_slot: Int[Array, " B"]
    sampler: Sampler
    lookup: PromptLookup | None = None


@functools.partial(jax.jit, static_argnums=(0, 1, 4, 5, 6, 7, 8))
def empty_state(
    config: ModelConfig,
    dtype: jnp.dtype,
    sampler: Sampler,
    lookup: PromptLookup | None,
    batch_slots: int,
    cache_length: int,
    routed: bool,
    layout: DeviceLayout | None = None,
    block: int = 0,
) -> DecodeState:
    """Return a batch whose slots are all free.

    Args:
      block: cache positions that attention reads at a time, see ``base.cache.KVCache``.
      sampler, lookup: those of any one sample, for their shapes.
      layout: device layout of the state; each device makes its own part.
    """

    def vacant(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: jnp.zeros((batch_slots, *leaf.shape[1:]), leaf.dtype), tree)

    shape = (batch_slots, config.num_kv_heads, cache_length, config.head_dim)
    layers = tuple(
        LayerCache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype)) for _ in range(config.num_layers)
    )
    zeros = functools.partial(jnp.zeros, (batch_slots,), jnp.int32)
    state = DecodeState(
        token=zeros(),
        position=zeros(),
        done=jnp.ones((batch_slots,), bool),
        cache=KVCache(layers=layers, length=zeros(), block=block),
        route=tuple(jnp.zeros((batch_slots, 1, 7), jnp.float32) for _ in layers) if routed else None,
        adapter_slot=zeros(),
        sampler=vacant(sampler),
        lookup=vacant(lookup),
    )
    return constrained(state, layout)


def with_layers(state: DecodeState, layers: Any) -> DecodeState:
    """Return the state with other keys and values."""
    return dataclasses.replace(state, cache=dataclasses.replace(state.cache, layers=layers))


def constrained(state: DecodeState, layout: DeviceLayout | None) -> DecodeState:
    """Return the state of a program with the shardings of :func:`state_shardings_of`.

    Left to itself XLA would choose anew for every program, and every choice would be one more program.
    """
    places = state_shardings_of(state, layout)
    return state if places is None else jax.lax.with_sharding_constraint(state, places)


def by_head(layers: Any, layout: DeviceLayout | None) -> Any:
    """Return keys and values of a program's result with the shardings that the state has for them."""
    if layout is None or layout.mesh is None:
        return layers
    return jax.lax.with_sharding_constraint(layers, _layer_sharding(layers, layout, layout.mesh))


def state_shardings_of(state: DecodeState, layout: DeviceLayout | None) -> PyTree | None:
    """Return shardings like the state: keys and values by rows and, where these divide evenly, heads; all
    else by rows. None on one device."""
    if layout is None or layout.mesh is None:
        return None
    by_row = NamedSharding(layout.mesh, jax.P(layout.rows))
    places = jax.tree.map(lambda _: by_row, with_layers(state, ()))
    sharding = _layer_sharding(state.cache.layers, layout, layout.mesh)
    return with_layers(places, jax.tree.map(lambda _: sharding, state.cache.layers))


def _layer_sharding(layers: Any, layout: DeviceLayout, mesh: Mesh) -> NamedSharding:
    heads = layout.heads_of(jax.tree.leaves(layers)[0].shape[1])
    return NamedSharding(mesh, jax.P(layout.rows, heads))
