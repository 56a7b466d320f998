"""The compiled programs of decoding: prefill, admit, and a chunk of steps.

``prefill`` runs prompts once, with the router. ``admit`` puts what it gave into rows of the running
batch and chooses their first tokens. ``decode_chunk`` is a jitted ``lax.scan`` of steps whose carry
holds the route: it reads it and never writes it, and holds no router and no conditional. A chunk has a
static length so that no step waits for the host. With prompt look-up a step also runs the D tokens that a row
proposes behind its last one, and gives a row up to 1 + D tokens.

A row's keys and values lie at the places of its own tokens, whatever the other rows hold, so a row's
tokens do not depend on its neighbours.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from milora_jax.adapters.protocol import Adapter
from milora_jax.base.attention import DeviceLayout, attention
from milora_jax.base.cache import KVCache
from milora_jax.base.modules import Base
from milora_jax.base.transformer import forward, unembed
from milora_jax.generation.adapter_stack import AdapterStack, GatheredAdapters
from milora_jax.generation.decode_state import DecodeState, constrained, with_layers
from milora_jax.generation.prompt_lookup import PromptLookup
from milora_jax.generation.sampling import NO_TOKEN, Choice, Plan, Sampler, choose, is_end, note
from milora_jax.model_config import ModelConfig
from milora_jax.shapes import Array, Bool, Float, Int, UInt
from milora_jax.types import Batch, Route


@struct.dataclass
class Prefilled:
    """The results of prefilling prompts, a row each.

    Attributes:
      logits: logits of the token after the prompt.
      position: position of that token in its text.
      cache: keys and values of the prompts; no layers where the rows of the batch have them already.
      route: routing weights of each layer; None without a router.
      hidden: normed residual stream of the prompt, for ``prompt_logprobs``; None once that is done.
    """

    logits: Float[Array, "R V"]
    position: Int[Array, " R"]
    cache: KVCache
    route: tuple[Float[Array, "R 1 E"], ...] | None
    hidden: Float[Array, "R T D"] | None


@struct.dataclass
class Decoded:
    """The tokens of some decode steps, in the order in which each row produced them.

    Attributes:
      choices: leaves ``[n, B, ...]``: n is the number of steps, times 1 + D with prompt look-up.
      absent: places without a token: the row had ended, or the token before was not the proposed one.
      proposed: tokens that were proposed to each row at each step; None without prompt look-up.
    """

    choices: Choice
    absent: Bool[Array, "n B"]
    proposed: Int[Array, "steps B"] | None = None

    @classmethod
    def first(cls, choice: Choice) -> Decoded:
        """Return the first token of every row, as :func:`admit` gives it."""
        choices = jax.tree.map(lambda leaf: leaf[None], choice)
        nothing: Any = np.zeros((1, choice.token.shape[0]), bool)
        return cls(choices, nothing)


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
      adapter_slot: slot of the adapter.
      batch: prompts, padded on the right.
      cache_length: S, at least a prefix, T and what is to come.
      layout: device layout of the rows and heads, for attention's kernels; see ``attention.device_layout``.

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
    lookup: PromptLookup | None,
    plan: Plan,
    layout: DeviceLayout | None = None,
    masks: UInt[Array, "n W"] | None = None,
) -> tuple[DecodeState, Choice]:
    """Put prefilled prompts into rows of the batch and choose their first tokens.

    Args:
      prefilled: n prompts.
      batch_slots: slots of the prompts; a prompt whose slot is beyond the batch is dropped.
      adapter_slot: slot of their adapter.
      sampler, lookup: those of the n prompts.
      layout: device layout of the state.
      masks: the first tokens that each prompt may get, see ``sampling.choose``.
    """
    choice = choose(prefilled.logits, sampler, prefilled.position, plan, masks)
    every = jnp.ones_like(batch_slots, bool)
    sampler = note(sampler, choice.token, every)
    new = DecodeState(
        token=choice.token,
        position=prefilled.position,
        done=is_end(sampler, choice.token),
        cache=dataclasses.replace(prefilled.cache, block=state.cache.block),
        route=prefilled.route,
        adapter_slot=adapter_slot,
        sampler=sampler,
        lookup=None if lookup is None else lookup.noted(choice.token, prefilled.position, every),
    )

    def put(old: Array, leaf: Array) -> Array:
        return old.at[batch_slots].set(leaf.astype(old.dtype), mode="drop", unique_indices=True)

    if prefilled.cache.layers:
        return constrained(jax.tree.map(put, state, new), layout), choice
    rest = jax.tree.map(put, with_layers(state, ()), new)
    return constrained(with_layers(rest, state.cache.layers), layout), choice


def decode_step(
    base: Base, adapter: Adapter | None, state: DecodeState, config: ModelConfig, plan: Plan
) -> tuple[DecodeState, Decoded]:
    """Return a token for every row, and the proposed tokens after it that were accepted.

    Rows that are done keep their last token and write nothing new.
    """
    logits, cache = _next_logits(base, adapter, state, config)
    return _advance(dataclasses.replace(state, cache=cache), logits, plan)


def _proposals(state: DecodeState) -> Int[Array, "B D"]:
    """What each row's text proposes; D is 0 without prompt look-up."""
    if state.lookup is None:
        return jnp.zeros((state.token.shape[0], 0), jnp.int32)
    return state.lookup.proposals(state.position)


def _next_logits(
    base: Base, adapter: Adapter | None, state: DecodeState, config: ModelConfig
) -> tuple[Float[Array, "B T V"], KVCache]:
    """Logits behind each row's last token and behind its proposals, T = 1 + D, and the cache with all these.

    The cache's length is that before them.
    """
    tokens = jnp.concatenate([state.token[:, None], _proposals(state)], axis=1)
    rows, count = tokens.shape
    # Rows that are done write nothing, since another prompt may be prefilled into theirs, and read nothing.
    length = jnp.where(state.done, state.cache.reach, state.cache.length)
    output = forward(
        base,
        config,
        Batch.unpadded(tokens, state.position[:, None] + jnp.arange(count, dtype=jnp.int32)[None]),
        adapter=adapter,
        route=state.route,
        cache=dataclasses.replace(state.cache, length=length),
    )
    if not isinstance(output.cache, KVCache):
        raise AssertionError("a pass gives the cache that it was given")
    logits = unembed(base, config, output.hidden.reshape(rows * count, -1))
    cache = dataclasses.replace(output.cache, length=state.cache.length)
    return logits.reshape(rows, count, -1), cache


def _advance(
    state: DecodeState,
    logits: Float[Array, "B T V"],
    plan: Plan,
    masks: UInt[Array, "B W"] | None = None,
) -> tuple[DecodeState, Decoded]:
    """Choose the live rows' tokens, as far as each was computed behind the token chosen before it.

    Args:
      state: with the cache that :func:`_next_logits` gave.
    """
    proposals = _proposals(state)
    before, live, choices, absent = state, ~state.done, [], []
    for place in range(logits.shape[1]):
        choice = choose(logits[:, place], state.sampler, state.position + 1, plan, masks)
        token = jnp.where(live, choice.token, state.token)
        sampler, step = note(state.sampler, token, live), live.astype(jnp.int32)
        position = state.position + step
        choices.append(dataclasses.replace(choice, token=token))
        absent.append(~live)
        state = dataclasses.replace(
            state,
            token=token,
            position=position,
            done=state.done | is_end(sampler, token),
            cache=dataclasses.replace(state.cache, length=state.cache.length + step),
            sampler=sampler,
            lookup=None if state.lookup is None else state.lookup.noted(token, position, live),
        )
        if place < proposals.shape[1]:
            live = live & ~state.done & (proposals[:, place] == token)
    proposed = None
    if before.lookup is not None:
        proposed = ((proposals != NO_TOKEN) & ~before.done[:, None]).sum(axis=1, dtype=jnp.int32)[None]
    return state, Decoded(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *choices), jnp.stack(absent), proposed
    )


@functools.partial(jax.jit, static_argnames=("config", "steps", "plan", "layout"), donate_argnames="state")
def decode_chunk(
    base: Base,
    adapters: AdapterStack | GatheredAdapters | None,
    state: DecodeState,
    config: ModelConfig,
    steps: int,
    plan: Plan,
    layout: DeviceLayout | None = None,
    held: Bool[Array, " B"] | None = None,
) -> tuple[DecodeState, Decoded]:
    """Run ``steps`` decode steps as one scan.

    Args:
      adapters: those that act on the batch; what depends on the adapter of each batch slot is done once per
        chunk.
      layout: device layout of the state.
      held: rows whose tokens are wanted; None for all that are not done.
    """
    state = _ended(state, held)
    adapter = None if adapters is None else adapters.for_batch(state.adapter_slot)

    def step(state: DecodeState, _: None) -> tuple[DecodeState, Decoded]:
        return decode_step(base, adapter, state, config, plan)

    state = dataclasses.replace(state, cache=state.cache.squeezed())
    state, decoded = jax.lax.scan(step, state, None, length=steps)
    state = dataclasses.replace(state, cache=state.cache.unsqueezed())
    in_order = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), decoded)
    return constrained(state, layout), in_order


@functools.partial(jax.jit, static_argnames=("config", "layout"), donate_argnames="state")
def decode_logits(
    base: Base,
    adapters: AdapterStack | GatheredAdapters | None,
    state: DecodeState,
    config: ModelConfig,
    layout: DeviceLayout | None = None,
    held: Bool[Array, " B"] | None = None,
) -> tuple[DecodeState, Float[Array, "B T V"]]:
    """Run the first half of a decode step: the model, whose results the host does not need.

    Meanwhile it makes the masks for the second half, :func:`decode_masked`.
    """
    state = _ended(state, held)
    adapter = None if adapters is None else adapters.for_batch(state.adapter_slot)
    logits, cache = _next_logits(base, adapter, state, config)
    return constrained(dataclasses.replace(state, cache=cache), layout), logits


@functools.partial(jax.jit, static_argnames=("plan", "layout"), donate_argnames="state")
def decode_masked(
    state: DecodeState,
    logits: Float[Array, "B T V"],
    masks: UInt[Array, "B W"],
    plan: Plan,
    layout: DeviceLayout | None = None,
) -> tuple[DecodeState, Decoded]:
    """Run the second half of a decode step: the choice among the tokens that each row may get.

    Args:
      logits: result of :func:`decode_logits`.
      masks: see ``sampling.choose``; all tokens for a row with proposals.

    Returns:
      As :func:`decode_chunk` of one step.
    """
    state, decoded = _advance(state, logits, plan, masks)
    return constrained(state, layout), decoded


def _ended(state: DecodeState, held: Bool[Array, " B"] | None) -> DecodeState:
    """The state with all rows done that nobody holds: a stop string or a client has ended them."""
    return state if held is None else dataclasses.replace(state, done=state.done | ~held)
