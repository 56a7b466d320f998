"""Greedy decoding with the route in the carry.

``prefill`` runs the prompt once, with the router, and puts the route into the state. ``decode_step``
reads it: the decode program holds no router. ``decode_chunk`` is a jitted ``lax.scan`` of steps, and
``generate_tokens`` runs chunks until every row has stopped. A chunk has a static length so that no
step waits for the host; the host looks at one flag per chunk.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from milora_jax.adapters.protocol import Adapter
from milora_jax.base.cache import KVCache, empty_cache
from milora_jax.base.transformer import Base, forward, unembed
from milora_jax.config import ModelConfig, require
from milora_jax.shapes import Array, Bool, Float, Int
from milora_jax.types import Batch, Route

CHUNK = 16
"""Decode steps between two looks at the done flag."""


@struct.dataclass
class DecodeState:
    """The carry of the decode scan.

    Attributes:
      token: the last token of each row, not yet run through the model.
      position: its position within the row's text.
      done: rows that have produced an end-of-sequence token.
      cache: keys and values of everything before ``token``.
      route: routing weights of each layer, computed by ``prefill`` and never written again; None
        without a router.
    """

    token: Int[Array, " B"]
    position: Int[Array, " B"]
    done: Bool[Array, " B"]
    cache: KVCache
    route: tuple[Float[Array, "B 1 E"], ...] | None


def _is_end(token: Int[Array, " B"], end_ids: tuple[int, ...]) -> Bool[Array, " B"]:
    ends = jnp.asarray(end_ids or (-1,), jnp.int32)
    return (token[:, None] == ends[None, :]).any(axis=-1)


@functools.partial(jax.jit, static_argnames=("config", "slots"))
def prefill(
    base: Base, adapter: Adapter | None, batch: Batch, config: ModelConfig, slots: int
) -> tuple[DecodeState, Route | None]:
    """Run the prompts, choose the routes, and pick each row's first token.

    Args:
      base, adapter: in the decode layout.
      batch: prompts, padded left or right.
      slots: room for tokens in the cache, at least T plus those to come.

    Returns:
      The state before the first decode step, and the whole route for looking at.
    """
    rows = batch.tokens.shape[0]
    prefixed = 0 if adapter is None else adapter.method.prefix_length
    output = forward(
        base,
        config,
        batch.tokens,
        batch.positions,
        batch.segment_ids,
        adapter=adapter,
        prompt_mask=batch.prompt_mask,
        cache=empty_cache(config, rows, prefixed + slots, base.dtype),
    )
    if output.cache is None:
        raise AssertionError("a forward pass with a cache gives one back")
    order = jnp.arange(batch.tokens.shape[1])[None, :]
    last = jnp.argmax(jnp.where(batch.segment_ids > 0, order, -1), axis=1)[:, None]
    hidden = jnp.take_along_axis(output.hidden, last[..., None], axis=1)[:, 0]
    token = jnp.argmax(unembed(base, hidden), axis=-1).astype(jnp.int32)
    state = DecodeState(
        token=token,
        position=jnp.take_along_axis(batch.positions, last, axis=1)[:, 0] + 1,
        done=_is_end(token, config.eos_ids),
        cache=output.cache,
        route=None if output.route is None else tuple(output.route.weights),
    )
    return state, output.route


def decode_step(base: Base, adapter: Adapter | None, state: DecodeState, config: ModelConfig) -> DecodeState:
    """One token for every row. Rows that are done keep their last token."""
    output = forward(
        base,
        config,
        state.token[:, None],
        state.position[:, None],
        jnp.ones_like(state.token)[:, None],
        adapter=adapter,
        route_weights=state.route,
        cache=state.cache,
    )
    token = jnp.argmax(unembed(base, output.hidden[:, 0]), axis=-1).astype(jnp.int32)
    token = jnp.where(state.done, state.token, token)
    return dataclasses.replace(
        state,
        token=token,
        position=state.position + 1,
        done=state.done | _is_end(token, config.eos_ids),
        cache=output.cache,
    )


@functools.partial(jax.jit, static_argnames=("config", "steps"), donate_argnames="state")
def decode_chunk(
    base: Base, adapter: Adapter | None, state: DecodeState, config: ModelConfig, steps: int
) -> tuple[DecodeState, Int[Array, "B steps"]]:
    """``steps`` decode steps as one scan; returns the tokens they chose.

    After a row's end-of-sequence token the row repeats it.
    """

    def step(state: DecodeState, _: None) -> tuple[DecodeState, Array]:
        state = decode_step(base, adapter, state, config)
        return state, state.token

    state, tokens = jax.lax.scan(step, state, None, length=steps)
    return state, tokens.T


def generate_tokens(
    base: Base, adapter: Adapter | None, batch: Batch, config: ModelConfig, max_new_tokens: int
) -> tuple[np.ndarray, Route | None]:
    """Greedy continuation of a batch of prompts.

    Args:
      base, adapter: in the decode layout.
      max_new_tokens: at least 1; prompt and continuation together at most ``config.max_positions``.

    Returns:
      Token ids ``[B, max_new_tokens]``, where a row that stopped repeats its end-of-sequence token;
      and the route.
    """
    require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "at least 1")
    length = batch.tokens.shape[1]
    chunks = -(-(max_new_tokens - 1) // CHUNK)
    state, route = prefill(base, adapter, batch, config, length + 1 + chunks * CHUNK)
    pieces = [np.asarray(state.token)[:, None]]
    for _ in range(chunks):
        if bool(state.done.all()):
            break
        state, tokens = decode_chunk(base, adapter, state, config, CHUNK)
        pieces.append(np.asarray(tokens))
    tokens = np.concatenate(pieces, axis=1)[:, :max_new_tokens]
    missing = max_new_tokens - tokens.shape[1]
    return np.pad(tokens, ((0, 0), (0, missing)), mode="edge"), route
