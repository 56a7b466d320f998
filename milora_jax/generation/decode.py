"""The compiled programs of decoding: prefill, admit, and a chunk of steps.

``prefill`` runs prompts once, with the router. ``admit`` puts what it gave into rows of the running
batch and chooses their first tokens. ``decode_chunk`` is a jitted ``lax.scan`` of steps whose carry
holds the route: it reads it and never writes it, and holds no router and no conditional. A chunk has a
static length so that no step waits for the host.

A row's keys and values lie at the places of its own tokens, whatever the other rows hold, so a row's
tokens do not depend on its neighbours.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import NamedSharding

from milora_jax.adapters.protocol import Adapter
from milora_jax.base.attention import DeviceLayout, attention
from milora_jax.base.cache import KVCache, LayerCache
from milora_jax.base.modules import Base
from milora_jax.base.transformer import forward, unembed
from milora_jax.generation.adapter_stack import AdapterStack, GatheredAdapters
from milora_jax.generation.sampling import Choice, Plan, Sampler, choose, is_end, note
from milora_jax.model_config import ModelConfig
from milora_jax.shapes import Array, Bool, Float, Int, UInt
from milora_jax.types import Batch, PyTree, Route


@struct.dataclass
class Prefilled:
    """Prompts that have been run, a row each.

    Attributes:
      logits: of the token after the prompt.
      position: of that token in its text.
      cache: keys and values of the prompt.
      route: routing weights of each layer; None without a router.
      hidden: normed residual stream of the prompt, for ``prompt_logprobs``; None once that is done.
    """

    logits: Float[Array, "R V"]
    position: Int[Array, " R"]
    cache: KVCache
    route: tuple[Float[Array, "R 1 E"], ...] | None
    hidden: Float[Array, "R T D"] | None


@struct.dataclass
class DecodeState:
    """The carry of the decode scan.

    Attributes:
      token: the last token of each row, not yet run through the model.
      position: its position within the row's text.
      done: rows that have ended, or that nobody uses.
      cache: keys and values of everything before ``token``.
      route: routing weights of each layer, computed by ``prefill`` and never written by a step; None
        without a router.
      adapter_slot: slot of each row's adapter in the bank.
      sampler: each row's settings.
    """

    token: Int[Array, " B"]
    position: Int[Array, " B"]
    done: Bool[Array, " B"]
    cache: KVCache
    route: tuple[Float[Array, "B 1 E"], ...] | None
    adapter_slot: Int[Array, " B"]
    sampler: Sampler


@functools.partial(jax.jit, static_argnames=("config", "cache_length", "layout"))
def prefill(
    base: Base,
    adapters: AdapterStack | None,
    adapter_slot: Int[Array, ""],
    batch: Batch,
    config: ModelConfig,
    cache_length: int,
    layout: DeviceLayout | None = None,
) -> tuple[Prefilled, Route | None]:
    """Run prompts of one adapter and choose their routes.

    Args:
      base: in the decode layout.
      adapter_slot: of the adapter.
      batch: prompts, padded on the right.
      cache_length: S, at least a prefix, T and what is to come.
      layout: of the rows and heads, for attention's kernels; see ``attention.device_layout``.

    Returns:
      What decoding starts from, and the whole route for looking at.
    """
    output = forward(
        base,
        config,
        batch,
        adapter=None if adapters is None else adapters.of_slot(adapter_slot),
        cache_length=cache_length,
        attend=functools.partial(attention, layout=layout),
    )
    if not isinstance(output.cache, KVCache):
        raise AssertionError("a first pass with cache_length gives a cache")
    length = (batch.segment_ids > 0).sum(axis=1, dtype=jnp.int32)
    hidden = jnp.take_along_axis(output.hidden, length[:, None, None] - 1, axis=1)[:, 0]
    prefilled = Prefilled(
        logits=unembed(base, config, hidden),
        position=length,
        cache=output.cache,
        route=None if output.route is None else tuple(output.route.weights),
        hidden=output.hidden,
    )
    return prefilled, output.route


@functools.partial(jax.jit, static_argnames=("plan", "layout"), donate_argnames="state")
def admit(
    state: DecodeState,
    prefilled: Prefilled,
    batch_slots: Int[Array, " n"],
    adapter_slot: Int[Array, " n"],
    sampler: Sampler,
    plan: Plan,
    layout: DeviceLayout | None = None,
    masks: UInt[Array, "n W"] | None = None,
) -> tuple[DecodeState, Choice]:
    """Put prefilled prompts into rows of the batch and choose their first tokens.

    Args:
      prefilled: n prompts, or one that is to be continued in n ways.
      batch_slots: where they go; a prompt whose slot is beyond the batch is dropped.
      adapter_slot: of their adapter.
      sampler: of the n prompts.
      layout: of the state.
      masks: the first tokens that each prompt may get, see ``sampling.choose``.
    """
    count = batch_slots.shape[0]

    def repeated(leaf: Array) -> Array:
        return jnp.broadcast_to(leaf, (count, *leaf.shape[1:]))

    prefilled = jax.tree.map(repeated, prefilled)
    choice = choose(prefilled.logits, sampler, prefilled.position, plan, masks)
    sampler = note(sampler, choice.token, jnp.ones_like(batch_slots, bool))
    new = DecodeState(
        token=choice.token,
        position=prefilled.position,
        done=is_end(sampler, choice.token),
        cache=prefilled.cache,
        route=prefilled.route,
        adapter_slot=adapter_slot,
        sampler=sampler,
    )

    def put(old: Array, leaf: Array) -> Array:
        return old.at[batch_slots].set(leaf.astype(old.dtype), mode="drop", unique_indices=True)

    return constrained(jax.tree.map(put, state, new), layout), choice


def decode_step(
    base: Base, adapter: Adapter | None, state: DecodeState, config: ModelConfig, plan: Plan
) -> tuple[DecodeState, Choice]:
    """One token for every row. Rows that are done keep their last token and write nothing new."""
    logits, cache = _next_logits(base, adapter, state, config)
    return _with_choice(state, cache, choose(logits, state.sampler, state.position + 1, plan))


def _next_logits(
    base: Base, adapter: Adapter | None, state: DecodeState, config: ModelConfig
) -> tuple[Float[Array, "B V"], KVCache]:
    """Logits of each row's next token, and the cache with its last one."""
    output = forward(
        base,
        config,
        Batch.unpadded(state.token[:, None], state.position[:, None]),
        adapter=adapter,
        route=state.route,
        cache=state.cache,
    )
    if not isinstance(output.cache, KVCache):
        raise AssertionError("a pass gives the cache that it was given")
    return unembed(base, config, output.hidden[:, 0]), output.cache


def _with_choice(state: DecodeState, cache: KVCache, choice: Choice) -> tuple[DecodeState, Choice]:
    """The state after a choice of tokens, and the choice of the live rows."""
    live = ~state.done
    choice = dataclasses.replace(choice, token=jnp.where(live, choice.token, state.token))
    sampler = note(state.sampler, choice.token, live)
    state = dataclasses.replace(
        state,
        token=choice.token,
        position=state.position + live.astype(jnp.int32),
        done=state.done | is_end(sampler, choice.token),
        cache=dataclasses.replace(cache, length=state.cache.length + live.astype(jnp.int32)),
        sampler=sampler,
    )
    return state, choice


@functools.partial(jax.jit, static_argnames=("config", "steps", "plan", "layout"), donate_argnames="state")
def decode_chunk(
    base: Base,
    adapters: AdapterStack | GatheredAdapters | None,
    state: DecodeState,
    config: ModelConfig,
    steps: int,
    plan: Plan,
    layout: DeviceLayout | None = None,
) -> tuple[DecodeState, Choice, Bool[Array, "steps B"]]:
    """``steps`` decode steps as one scan.

    Args:
      adapters: those that act on the batch; what depends on the adapter of each batch slot is done once per
        chunk.
      layout: of the state.

    Returns:
      The state, the choices of every step, and which rows had ended before each step.
    """
    adapter = None if adapters is None else adapters.for_batch(state.adapter_slot)

    def step(state: DecodeState, _: None) -> tuple[DecodeState, tuple[Choice, Array]]:
        ended = state.done
        state, choice = decode_step(base, adapter, state, config, plan)
        return state, (choice, ended)

    state = dataclasses.replace(state, cache=state.cache.squeezed())
    state, (choices, ended) = jax.lax.scan(step, state, None, length=steps)
    state = dataclasses.replace(state, cache=state.cache.unsqueezed())
    return constrained(state, layout), choices, ended


@functools.partial(jax.jit, static_argnames=("config", "layout"), donate_argnames="state")
def decode_logits(
    base: Base,
    adapters: AdapterStack | GatheredAdapters | None,
    state: DecodeState,
    config: ModelConfig,
    layout: DeviceLayout | None = None,
) -> tuple[DecodeState, Float[Array, "B V"]]:
    """The first half of a decode step: the model, of which the host needs no result.

    Meanwhile it makes the masks for the second half, :func:`decode_masked`.
    """
    adapter = None if adapters is None else adapters.for_batch(state.adapter_slot)
    logits, cache = _next_logits(base, adapter, state, config)
    cache = dataclasses.replace(cache, length=state.cache.length)
    return constrained(dataclasses.replace(state, cache=cache), layout), logits


@functools.partial(jax.jit, static_argnames=("plan", "layout"), donate_argnames="state")
def decode_masked(
    state: DecodeState,
    logits: Float[Array, "B V"],
    masks: UInt[Array, "B W"],
    plan: Plan,
    layout: DeviceLayout | None = None,
) -> tuple[DecodeState, Choice, Bool[Array, "1 B"]]:
    """The second half of a decode step: the choice among the tokens that each row may get.

    Args:
      logits: of :func:`decode_logits`.
      masks: see ``sampling.choose``.

    Returns:
      As :func:`decode_chunk` of one step.
    """
    ended = state.done
    choice = choose(logits, state.sampler, state.position + 1, plan, masks)
    state, choice = _with_choice(state, state.cache, choice)
    return constrained(state, layout), jax.tree.map(lambda leaf: leaf[None], choice), ended[None]


def constrained(state: DecodeState, layout: DeviceLayout | None) -> DecodeState:
    """The state of a program as :func:`state_shardings_of` says.

    Left to itself XLA would choose anew for every program, and every choice would be one more program.
    """
    places = state_shardings_of(state, layout)
    return state if places is None else jax.lax.with_sharding_constraint(state, places)


def state_shardings_of(state: DecodeState, layout: DeviceLayout | None) -> PyTree | None:
    """Shardings like the state: keys and values by rows and heads, all else by rows; None on one device."""
    if layout is None or layout.mesh is None:
        return None
    by_row = NamedSharding(layout.mesh, jax.P(layout.rows))
    by_head = NamedSharding(layout.mesh, jax.P(layout.rows, layout.heads))
    cache = jax.tree.map(lambda leaf: by_head if leaf.ndim == 4 else by_row, state.cache)
    return dataclasses.replace(jax.tree.map(lambda _: by_row, state), cache=cache)


def empty_state(
    config: ModelConfig, base: Base, sampler: Sampler, batch_slots: int, cache_length: int, routed: bool
) -> DecodeState:
    """A batch whose slots are all free.

    Args:
      sampler: of any one sample, for its shapes.
    """
    shape = (batch_slots, config.num_kv_heads, cache_length, config.head_dim)
    layers = tuple(
        LayerCache(k=jnp.zeros(shape, base.dtype), v=jnp.zeros(shape, base.dtype))
        for _ in range(config.num_layers)
    )
    zeros = functools.partial(jnp.zeros, (batch_slots,), jnp.int32)
    return DecodeState(
        token=zeros(),
        position=zeros(),
        done=jnp.ones((batch_slots,), bool),
        cache=KVCache(layers=layers, length=zeros()),
        route=tuple(jnp.zeros((batch_slots, 1, 7), jnp.float32) for _ in layers) if routed else None,
        adapter_slot=zeros(),
        sampler=jax.tree.map(lambda leaf: jnp.zeros((batch_slots, *leaf.shape[1:]), leaf.dtype), sampler),
    )
