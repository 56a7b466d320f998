"""Prefill in slices of one layer and one block of tokens.

A long prompt that is prefilled in one program stops every stream for as long as it takes. A layer's route
depends on all prompt tokens that its router reads, so a prompt cannot be cut into blocks of tokens that pass
through all layers one after the other; it is cut into layers, and within a layer, once its route is known,
into blocks. Between two slices the device can run decode steps. Keys and values are written into the row of
the batch in which the prompt will be decoded.

Blocks lie at fixed places, and all of them run the same program: what it computes has the same bits whatever
the length of the prompt, whatever was computed just before, and whether the keys and values before it come
from this prefill or from a :class:`~milora_jax.generation.prefix_cache.PrefixCache`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from milora_jax.adapters.inputs import LayerInput
from milora_jax.base.attention import DeviceLayout
from milora_jax.base.attention_context import AttentionContext
from milora_jax.base.cache import READ_BLOCK, KVCache, LayerCache, SlotLayerCache
from milora_jax.base.modules import Base, JoinedLayer, Layer, ends_of
from milora_jax.base.transformer import AdaptedLayer, Past, block, embed, final_norm, input_norm, unembed
from milora_jax.generation.adapter_stack import AdapterStack
from milora_jax.generation.decode import Prefilled
from milora_jax.generation.decode_state import by_head
from milora_jax.generation.lengths import bucket_of
from milora_jax.generation.prefix_cache import KeptPrefix
from milora_jax.generation.prompt_logprobs import PromptLogprobs, prompt_logprobs
from milora_jax.generation.running_batch import RunningBatch
from milora_jax.model_config import ModelConfig
from milora_jax.shapes import Array, Float, Int
from milora_jax.types import Batch

BLOCK = 64
"""Tokens of a block. Smaller blocks are shared more often but start more programs."""


class BlockPrefill:
    """The prefill of one prompt through the layers of a base.

    Args:
      base: in the decode layout.
      prompt: token ids.
      adapter_slot: slot of its adapter.
      batch: the running batch, whose cache positions are a multiple of ``block``.
      row: row of the batch for the prompt's keys and values, which nothing else writes meanwhile.
      block: tokens of a block.
      route_tokens: leading tokens that the routers read; 0 for all.
      kept: what a prefix cache has of the prompt.
      scored: whether log-probabilities of the prompt are wanted, for which nothing may be kept.

    Attributes:
      slices: number of slices that are still to be run.
    """

    def __init__(
        self,
        base: Base,
        config: ModelConfig,
        prompt: Sequence[int],
        adapter_slot: int,
        batch: RunningBatch,
        row: int,
        *,
        block: int = BLOCK,
        route_tokens: int = 0,
        kept: KeptPrefix | None = None,
        scored: bool = False,
    ) -> None:
        self._base, self._slot = base, np.int32(adapter_slot)
        self._adapters: AdapterStack | None = None
        self._config, self._batch, self._row = config, batch, row
        self._length, self._scope = len(prompt), route_tokens or len(prompt)
        self._kept = kept or KeptPrefix()
        self._block, self._scored = block, scored
        self._last = (len(prompt) - 1) // block
        self._routes: list[Float[Array, "1 1 E"]] = list(self._kept.route or ())
        batch.paste(row, self._kept.blocks)
        self._tokens = np.zeros((1, (self._last + 1) * block), np.int32)
        self._tokens[0, : len(prompt)] = prompt
        self._ends = ends_of(base)
        self._hidden = {
            number: embed_block(self._ends, self._tokens[:, self._place(number)], config)
            for number in range(len(self._kept.blocks), self._last + 1)
        }
        self._newest = self._hidden[self._last]
        self.slices = config.num_layers * len(self._hidden)
        self._steps = self._run()

    @property
    def cached_tokens(self) -> int:
        """Number of prompt tokens whose keys and values came from the prefix cache."""
        return len(self._kept.blocks) * self._block

    def _place(self, number: int) -> slice:
        """Where a block's tokens are in the prompt."""
        return slice(number * self._block, (number + 1) * self._block)

    def advance(self, slices: int, adapters: AdapterStack | None) -> Array:
        """Start at most this many slices.

        Args:
          adapters: whose method has no prefix; None for the plain base.

        Returns:
          An array that is ready when they have been run.
        """
        self._adapters = adapters
        for _ in range(min(slices, self.slices)):
            next(self._steps)
        return self._newest

    def result(self) -> tuple[Prefilled, Float[Array, "L 1 E"] | None, tuple[PromptLogprobs, ...] | None]:
        """Return the start of decoding after all slices, routing weights, and what ``scored`` asks for."""
        scores = self._logprobs() if self._scored else None
        prefilled = finish(
            self._ends,
            self._hidden[self._last],
            np.int32((self._length - 1) % self._block),
            np.int32(self._length),
            self._config,
        )
        if not self._routes:
            return prefilled, None, scores
        routed = dataclasses.replace(prefilled, route=tuple(self._routes))
        return routed, jnp.concatenate(self._routes), scores

    def _logprobs(self) -> tuple[PromptLogprobs, ...]:
        """Log-probabilities of the prompt, block by block."""
        following, found = np.roll(self._tokens, -1, axis=1), []
        for number, hidden in self._hidden.items():
            normed = norm_block(self._ends, hidden, self._config)
            found.append(prompt_logprobs(self._ends, self._config, normed, following[:, self._place(number)]))
        return tuple(found)

    def to_keep(self) -> KeptPrefix:
        """Return what a prefix cache may keep of the prompt after all slices: whole blocks and its route."""
        fresh = range(self.cached_tokens, self._length - self._block + 1, self._block)
        blocks = self._batch.cut(self._row, fresh, self._block)
        return KeptPrefix((*self._kept.blocks, *blocks), tuple(self._routes) or None)

    def compile_route(self, adapters: AdapterStack | None) -> None:
        """Compile the one program that depends on the length of a prompt, without its slices."""
        self._adapters = adapters
        self._new_route(0)

    def _run(self) -> Iterator[None]:
        """Run a slice for each value that is asked for."""
        known = list(self._routes)
        for index in range(self._config.num_layers):
            route = known[index] if known else self._new_route(index)
            if route is not None and not known:
                self._routes.append(route)
            for number in self._hidden:
                self._run_slice(index, number, route)
                self.slices -= 1
                yield

    def _run_slice(self, index: int, number: int, route: Float[Array, "1 1 E"] | None) -> None:
        """Run a block through a layer."""
        self._hidden[number], cache = run_block(
            self._base.layers[index],
            self._layer_adapters(index),
            self._slot,
            route,
            self._hidden[number],
            self._batch.layers[index],
            np.int32(self._row),
            np.int32(number * self._block),
            self._config,
            self._config.slides[index],
            self._batch.layout,
        )
        self._batch.put_layer(index, cache)
        self._newest = self._hidden[number]

    def _layer_adapters(self, index: int) -> AdapterStack | None:
        return None if self._adapters is None else self._adapters.of_layer(index)

    def _new_route(self, index: int) -> Float[Array, "1 1 E"] | None:
        """The route of a layer that none of its blocks has passed; None without a router."""
        adapters = self._layer_adapters(index)
        if adapters is None or not adapters.method.routes:
            return None
        scope = [self._hidden[number] for number in range((self._scope - 1) // self._block + 1)]
        # Filled up to a power of two of blocks, of which the last are masked out, so that programs are few.
        scope += scope[-1:] * (bucket_of(len(scope), 2 * len(scope), 1) - len(scope))
        depth = np.float32(index / self._config.num_layers)
        layer, tokens = self._base.layers[index], np.int32(self._scope)
        return route_layer(layer, adapters, self._slot, tuple(scope), tokens, depth, self._config)


@functools.partial(jax.jit, static_argnames="config")
def embed_block(ends: Base, tokens: Int[Array, "1 T"], config: ModelConfig) -> Float[Array, "1 T D"]:
    """Return the residual stream before the first layer.

    Args:
      ends: the base without its layers.
    """
    return embed(ends, config, tokens)


@functools.partial(jax.jit, static_argnames="config")
def norm_block(ends: Base, hidden: Float[Array, "1 T D"], config: ModelConfig) -> Float[Array, "1 T D"]:
    """Return the residual stream after the final norm."""
    return final_norm(ends, config, hidden)


@functools.partial(jax.jit, static_argnames="config")
def route_layer(
    layer: Layer | JoinedLayer,
    adapters: AdapterStack,
    adapter_slot: Int[Array, ""],
    hidden: tuple[Float[Array, "1 T D"], ...],
    scope: Int[Array, ""],
    depth: Float[Array, ""],
    config: ModelConfig,
) -> Float[Array, "1 1 E"]:
    """Return the routing weights of one layer.

    Args:
      adapters: adapters of this layer.
      hidden: input of the layer, block by block.
      scope: number of tokens that the router reads.
    """
    adapter = adapters.of_slot(adapter_slot)
    stream = jnp.concatenate(hidden, axis=1)
    members = (jnp.arange(stream.shape[1]) < scope)[None, None]
    entering = LayerInput(stream, input_norm(config, layer, stream), members, depth)
    route = adapter.method.route(adapter.params[0], entering)
    if route is None:
        raise AssertionError("a method that routes gives a route in prefill")
    return route.weights


@functools.partial(jax.jit, static_argnames=("config", "sliding", "layout"), donate_argnames="cache")
def run_block(
    layer: Layer | JoinedLayer,
    adapters: AdapterStack | None,
    adapter_slot: Int[Array, ""],
    route: Float[Array, "1 1 E"] | None,
    hidden: Float[Array, "1 T D"],
    cache: LayerCache,
    row: Int[Array, ""],
    start: Int[Array, ""],
    config: ModelConfig,
    sliding: bool,
    layout: DeviceLayout | None,
) -> tuple[Float[Array, "1 T D"], LayerCache]:
    """Run one block of tokens through one layer.

    Args:
      adapters: adapters of this layer; None for the plain base.
      route: route of this layer; None without a router.
      cache: cache of the layer, whose row has the blocks before.
      row: row of the cache that the block is written into.
      start: position of the block's first token.
      sliding: whether the layer has a sliding window.
      layout: device layout of the cache.
    """
    slot = SlotLayerCache(cache, row)
    past = KVCache(layers=(cache,), length=start[None], block=READ_BLOCK)
    positions = (start + jnp.arange(hidden.shape[1], dtype=jnp.int32))[None]
    batch = Batch.unpadded(jnp.zeros_like(positions), positions)
    context = AttentionContext.of(config, batch, 0, past)
    adapter = None if adapters is None else adapters.of_slot(adapter_slot)
    params = None if adapter is None else adapter.params[0]
    adapted = AdaptedLayer(layer, adapter, params, route, None)
    earlier = Past(slot, past.place, context.cached(sliding))
    hidden, new = block(config, adapted, hidden, context.angles(sliding), None, earlier)
    return hidden, by_head(new.whole, layout)


@functools.partial(jax.jit, static_argnames="config")
def finish(
    ends: Base,
    hidden: Float[Array, "1 T D"],
    last: Int[Array, ""],
    length: Int[Array, ""],
    config: ModelConfig,
) -> Prefilled:
    """Return what decoding starts from, without the route.

    Args:
      hidden: the last block behind the last layer.
      last: place of the prompt's last token in it.
      length: length of the prompt.
    """
    stream = jax.lax.dynamic_index_in_dim(hidden, last, axis=1, keepdims=False)
    logits = unembed(ends, config, final_norm(ends, config, stream))
    cache = KVCache(layers=(), length=length[None])
    return Prefilled(logits=logits, position=cache.length, cache=cache, route=None, hidden=None)
