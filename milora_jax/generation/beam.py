"""Beam search, with the results of Hugging Face's ``generate(num_beams=...)``.

The beams of a prompt share its keys, values and route. No cache is ever reordered: every beam writes at
its own place, and who descends from whom is a small table that becomes the attention mask.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from milora_jax.adapters.protocol import Adapter
from milora_jax.base.attention import DeviceLayout, device_layout
from milora_jax.base.cache import BeamCache
from milora_jax.base.modules import Base
from milora_jax.base.transformer import forward, unembed
from milora_jax.data.batches import collate_prompts
from milora_jax.generation.adapter_stack import AdapterStack
from milora_jax.generation.decode import Prefilled, prefill
from milora_jax.generation.engine import CHUNK
from milora_jax.generation.lengths import bucket_of
from milora_jax.generation.settings import GenerationSettings
from milora_jax.model_config import ModelConfig
from milora_jax.parallel.processes import gather, to_host
from milora_jax.parallel.rules import place_rows
from milora_jax.shapes import Array, Bool, Float, Int
from milora_jax.types import Batch

WORST = -1e9
"""The score of tokens that must not be chosen."""


@struct.dataclass
class BeamState:
    """The carry of the search. P prompts, K beams, N the most new tokens.

    Attributes:
      cache: key-value cache of prompts and beams.
      route: routing weights of every beam's row; None without a router.
      start: position of the first new token of each prompt.
      running: tokens of the beams that go on.
      scores: their summed log-probabilities.
      finished: the best finished continuations, best first.
      finished_scores: theirs, after the length penalty.
      lengths: number of their tokens.
      ended: which of them exist.
      improvable: prompts whose running beams might still beat a finished one.
      done: prompts whose search is over.
    """

    cache: BeamCache
    route: tuple[Float[Array, "B 1 E"], ...] | None
    start: Int[Array, " P"]
    running: Int[Array, "P K N"]
    scores: Float[Array, "P K"]
    finished: Int[Array, "P K N"]
    finished_scores: Float[Array, "P K"]
    lengths: Int[Array, "P K"]
    ended: Bool[Array, "P K"]
    improvable: Bool[Array, " P"]
    done: Bool[Array, " P"]


@dataclass(frozen=True)
class Terms:
    """The settings by which the search compares beams; static.

    Attributes:
      limit: N.
      ends: tokens that end a continuation.
    """

    beams: int
    limit: int
    ends: tuple[int, ...]
    length_penalty: float
    early_stopping: bool


@dataclass(frozen=True)
class Found:
    """The best continuation of one prompt.

    Attributes:
      tokens: up to and including the one that ended it.
      score: its summed log-probability after the length penalty.
      finish: "stop" or "length".
      route: routing weights ``[L, E]`` of the prompt.
    """

    tokens: tuple[int, ...]
    score: float
    finish: str
    route: np.ndarray | None


def beam_search(
    base: Base,
    config: ModelConfig,
    adapters: AdapterStack | None,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    adapter_slot: int = 0,
    rows: int = 0,
    route_tokens: Sequence[int] = (),
    layout: DeviceLayout | None = None,
) -> list[Found]:
    """Return the best continuation of each prompt.

    Args:
      base: in the decode layout.
      prompts: token ids.
      settings: the settings of all prompts.
      adapter_slot: slot of their adapter.
      route_tokens: how many tokens of each prompt the routers read, see ``data.batches.collate_prompts``.
      rows: prompts the program is compiled for, at least as many as there are; 0 is their number.
      layout: of rows and heads over several devices, as an ``Engine`` has it.
    """
    rows = rows or len(prompts)
    bucket = bucket_of(max(len(ids) for ids in prompts), config.max_positions)
    layout = layout or device_layout(base.devices)
    batch = place_rows(collate_prompts(prompts, bucket, 0, rows, route_tokens), layout)
    prefix = 0 if adapters is None else adapters.method.prefix_length
    prefilled, route = prefill(base, adapters, np.int32(adapter_slot), batch, config, prefix + bucket, layout)
    ends = (*settings.stop_token_ids, *(() if settings.ignore_eos else config.eos_ids))
    terms = Terms(
        settings.num_beams, settings.max_new_tokens, ends, settings.length_penalty, settings.early_stopping
    )
    state = _start(prefilled, terms)
    steps = settings.max_new_tokens - 1
    started = 0
    previous: jax.Array | None = None
    while started < steps:
        count = min(CHUNK, steps - started)
        state, done = beam_chunk(base, adapters, np.int32(adapter_slot), state, config, count, terms)
        started += count
        # The host looks at the flag of the chunk before while the device computes this one.
        if previous is not None and bool(np.asarray(previous)[: len(prompts)].all()):
            break
        previous = gather(done)
    read = state.finished, state.lengths, state.finished_scores, None if route is None else route.weights
    tokens, lengths, scores, weights = to_host(read)
    found = []
    for i in range(len(prompts)):
        mine = tuple(int(token) for token in tokens[i, 0, : lengths[i, 0]])
        finish = "stop" if mine and mine[-1] in ends else "length"
        found.append(Found(mine, float(scores[i, 0]), finish, None if weights is None else weights[:, i, 0]))
    return found


@functools.partial(jax.jit, static_argnames="terms")
def _start(prefilled: Prefilled, terms: Terms) -> BeamState:
    """The state after the first choice."""
    prompts, beams, limit = prefilled.position.shape[0], terms.beams, terms.limit
    tokens = jnp.zeros((prompts, beams, limit), jnp.int32)
    scores = jnp.where(jnp.arange(beams) == 0, 0.0, WORST)
    state = BeamState(
        cache=BeamCache.of(prefilled.cache, beams, max(limit - 1, 1)),
        route=None
        if prefilled.route is None
        else tuple(jnp.repeat(weights, beams, axis=0) for weights in prefilled.route),
        start=prefilled.position,
        running=tokens,
        scores=jnp.broadcast_to(scores[None], (prompts, beams)),
        finished=tokens,
        finished_scores=jnp.full((prompts, beams), WORST),
        lengths=jnp.zeros((prompts, beams), jnp.int32),
        ended=jnp.zeros((prompts, beams), bool),
        improvable=jnp.ones((prompts,), bool),
        done=jnp.zeros((prompts,), bool),
    )
    logits = jnp.repeat(prefilled.logits[:, None], beams, axis=1)
    return select(state, logits, jnp.zeros((), jnp.int32), terms)


@functools.partial(jax.jit, static_argnames=("config", "steps", "terms"), donate_argnames="state")
def beam_chunk(
    base: Base,
    adapters: AdapterStack | None,
    adapter_slot: Int[Array, ""],
    state: BeamState,
    config: ModelConfig,
    steps: int,
    terms: Terms,
) -> tuple[BeamState, Bool[Array, " P"]]:
    """Run ``steps`` steps of the search as one scan, and return which searches are complete."""
    adapter = None if adapters is None else adapters.of_slot(adapter_slot)

    def step(state: BeamState, _: None) -> tuple[BeamState, None]:
        return _step(base, adapter, state, config, terms), None

    state = dataclasses.replace(state, cache=state.cache.squeezed())
    state, _ = jax.lax.scan(step, state, None, length=steps)
    return dataclasses.replace(state, cache=state.cache.unsqueezed()), state.done


def _step(
    base: Base, adapter: Adapter | None, state: BeamState, config: ModelConfig, terms: Terms
) -> BeamState:
    """Run every beam's last token, and choose the next."""
    last = state.cache.step
    tokens = jax.lax.dynamic_index_in_dim(state.running, last, axis=2, keepdims=False).reshape(-1, 1)
    positions = jnp.repeat(state.start + last, terms.beams)[:, None]
    batch = Batch.unpadded(tokens, positions)
    output = forward(base, config, batch, adapter=adapter, route=state.route, cache=state.cache)
    logits = unembed(base, config, output.hidden[:, 0]).reshape(*state.scores.shape, -1)
    return select(dataclasses.replace(state, cache=output.cache), logits, last + 1, terms)


def select(state: BeamState, logits: Float[Array, "P K V"], step: Int[Array, ""], terms: Terms) -> BeamState:
    """Return the beams after the choice of token number ``step``.

    Twice as many candidates as beams are looked at (more with several end tokens), so that as many
    beams as before can go on whatever ends. A candidate that ends counts as finished only if it is among
    the first K.
    """
    beams, limit = terms.beams, terms.limit
    prompts, _, vocab = logits.shape
    with jax.named_scope("choose"):
        total = jax.nn.log_softmax(logits, axis=-1) + state.scores[..., None]
        kept = min(max(2, 1 + len(terms.ends)) * beams, beams * vocab)
        scores, places = jax.lax.top_k(total.reshape(prompts, -1), kept)
        parents, tokens = places // vocab, (places % vocab).astype(jnp.int32)
        candidates = jnp.take_along_axis(state.running, parents[..., None], axis=1)
        candidates = jnp.where(jnp.arange(limit)[None, None] == step, tokens[..., None], candidates)
        is_end = (tokens[..., None] == jnp.array(terms.ends or (-1,), jnp.int32)[None, None]).any(axis=-1)
        hits = is_end | (step + 1 >= limit)

        running_scores, chosen = jax.lax.top_k(jnp.where(hits, scores + WORST, scores), beams)
        running = jnp.take_along_axis(candidates, chosen[..., None], axis=1)
        chosen_parents = jnp.take_along_axis(parents, chosen, axis=1)
        ancestry = jnp.take_along_axis(state.cache.ancestry, chosen_parents[..., None], axis=1)
        here = jnp.arange(ancestry.shape[-1])[None, None] == step
        ancestry = jnp.where(here, jnp.arange(beams, dtype=jnp.int32)[None, :, None], ancestry)

        length = (step + 1).astype(jnp.float32)
        full = state.ended.all(axis=1) & terms.early_stopping
        counts = hits & (jnp.arange(kept) < beams)[None] & ~full[:, None] & state.improvable[:, None]
        new_scores = jnp.where(counts, scores / length**terms.length_penalty, WORST)
        merged_scores = jnp.concatenate([state.finished_scores, new_scores], axis=1)
        finished_scores, best = jax.lax.top_k(merged_scores, beams)

        def merged(old: Array, new: Array) -> Array:
            both = jnp.concatenate([old, new], axis=1)
            index = best.reshape(*best.shape, *[1] * (both.ndim - 2))
            return jnp.take_along_axis(both, index, axis=1)

        lengths = jnp.broadcast_to(step + 1, hits.shape).astype(jnp.int32)
        ended = merged(state.ended, counts)
        hope = running_scores[:, 0] / length**terms.length_penalty
        worst = jnp.where(ended, finished_scores.min(axis=1, keepdims=True), WORST)
        improvable = state.improvable & (hope[:, None] > worst).any(axis=1)
        over = ~improvable | (ended.all(axis=1) & terms.early_stopping) | hits.all(axis=1)
        return dataclasses.replace(
            state,
            cache=dataclasses.replace(state.cache, ancestry=ancestry),
            running=running,
            scores=running_scores,
            finished=merged(state.finished, candidates),
            finished_scores=finished_scores,
            lengths=merged(state.lengths, lengths),
            ended=ended,
            improvable=improvable,
            done=state.done | over,
        )
