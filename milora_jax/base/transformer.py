"""The frozen LLaMA-architecture Transformer, with the places where an adapter may act.

The modules are Flax NNX modules used as a typed pytree and nothing else: they hold leaves, the
functions below do the work, and only ``jax.*`` transforms are applied to them. Layers come stacked on
a leading axis and run by ``jax.lax.scan`` (training compiles one layer), or as a tuple and unrolled
(decoding copies no slices); ``types.unstack_layers`` turns the first into the second.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct

from milora_jax.adapters.protocol import Adapter, Frozen, Kernels, ProjectionGroup
from milora_jax.base import ops
from milora_jax.base.cache import KVCache, LayerCache
from milora_jax.config import ModelConfig
from milora_jax.shapes import Array, Bool, Float, Int, Key
from milora_jax.types import EXPERTS, GROUPS, PyTree, Route, unstack_layers


class Linear(nnx.Module):
    """A linear map: kernel ``[*L, d_in, d_out]`` and bias ``[*L, d_out]`` or None."""

    def __init__(self, kernel: Any, bias: Any) -> None:
        self.kernel = nnx.Param(kernel)
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, x: Float[Array, "*B d_in"]) -> Float[Array, "*B d_out"]:
        """The map applied to ``x``."""
        return ops.linear(x, self.kernel[...], None if self.bias is None else self.bias[...])


class Layer(nnx.Module):
    """The leaves of one decoder layer, or of all layers on a leading axis.

    Attributes:
      attention_norm, feedforward_norm: RMS weights ``[*L, D]``.
      q, k, v, o, gate, up, down: the seven linear modules of ``types.EXPERTS``.
    """

    def __init__(self, attention_norm: Any, feedforward_norm: Any, modules: dict[str, Linear]) -> None:
        self.attention_norm = nnx.Param(attention_norm)
        self.feedforward_norm = nnx.Param(feedforward_norm)
        self.q, self.k, self.v, self.o = (modules[name] for name in ("q", "k", "v", "o"))
        self.gate, self.up, self.down = (modules[name] for name in ("gate", "up", "down"))


class Base(nnx.Module):
    """The whole frozen model.

    Attributes:
      embedding: ``[V, D]``.
      layers: one stacked Layer, or a tuple of L of them.
      final_norm: ``[D]``.
      head: ``[D, V]``, or None where the embedding is tied to it.
    """

    def __init__(self, embedding: Any, layers: Any, final_norm: Any, head: Any) -> None:
        self.embedding = nnx.Param(embedding)
        self.layers = nnx.data(layers)
        self.final_norm = nnx.Param(final_norm)
        self.head = None if head is None else nnx.Param(head)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the leaves, in which activations are computed."""
        return self.embedding[...].dtype


@struct.dataclass
class Output:
    """What a forward pass gives.

    Attributes:
      hidden: residual stream after the final norm; ``unembed`` turns it into logits.
      route: the route, ``[L, B, Z, E]``, if this pass computed it.
      cache: the cache with this pass's tokens in it, if one was given.
    """

    hidden: Float[Array, "B T D"]
    route: Route | None
    cache: KVCache | None


def decode_layout(base: Base) -> Base:
    """The same base with its layers as a tuple, for decoding."""
    head = None if base.head is None else base.head[...]
    return Base(base.embedding[...], unstack_layers(base.layers), base.final_norm[...], head)


def adapter_decode_layout(adapter: Adapter) -> Adapter:
    """The same adapter, settled, with its layers as a tuple, for decoding."""
    return dataclasses.replace(adapter, params=unstack_layers(adapter.method.settle(adapter.params)))


def frozen_kernels(base: Base) -> Kernels:
    """The stacked kernels ``[L, d_in, d_out]`` of the seven modules, from which a method may start."""
    return {name: getattr(base.layers, name).kernel[...] for name in EXPERTS}


def prompt_members(
    segment_ids: Int[Array, "B T"], prompt_mask: Bool[Array, "B T"], prompts: int
) -> Bool[Array, "B Z T"]:
    """Which tokens are the prompt of which of the ``prompts`` (Z) records packed in a row."""
    record = jnp.arange(1, prompts + 1)[None, :, None]
    return (segment_ids[:, None, :] == record) & prompt_mask[:, None, :]


def forward(
    base: Base,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    adapter: Adapter | None = None,
    prompt_mask: Bool[Array, "B T"] | None = None,
    prompts: int = 1,
    route_weights: PyTree = None,
    cache: KVCache | None = None,
    key: Key[Array, ""] | None = None,
) -> Output:
    """Run the model over tokens.

    A pass with ``prompt_mask`` is the first over its records: every layer routes, the route is
    returned, and a method's prefix goes before the tokens. A pass without one goes on where an earlier
    one ended: it takes ``route_weights``, finds the prefix in the cache, and has no router in it at all.

    Args:
      tokens, positions, segment_ids: see ``types.Batch``.
      adapter: what changes the layers; None is the plain base. Its layers must have the layout of the
        base's.
      prompt_mask: which tokens belong to prompts.
      prompts: Z, the most records packed into one row.
      route_weights: weights of an earlier pass, ``[L, B, Z, E]`` or a tuple of L ``[B, Z, E]``.
      cache: keys and values of earlier tokens; this pass's are appended.
      key: switches dropout on.
    """
    unrolled = isinstance(base.layers, tuple)
    method = None if adapter is None else adapter.method
    if method is not None and method.routes and (prompt_mask is None) == (route_weights is None):
        raise ValueError("an adapter with a router needs either prompt_mask or route_weights")
    if method is not None and method.prefix_length and prompt_mask is None and cache is None:
        raise ValueError("an adapter with a prefix needs prompt_mask, or the cache of a pass that had one")
    members = None if prompt_mask is None else prompt_members(segment_ids, prompt_mask, prompts)
    new_segments = segment_ids
    if method is not None and method.prefix_length and members is not None:
        of_prefix = jnp.repeat(jnp.arange(1, prompts + 1, dtype=segment_ids.dtype), method.prefix_length)
        of_prefix = jnp.broadcast_to(of_prefix, (tokens.shape[0], of_prefix.size))
        new_segments = jnp.concatenate([of_prefix, segment_ids], axis=1)
    prefixed = new_segments.shape[1] - segment_ids.shape[1]
    if cache is None:
        key_segments, slot = new_segments, jnp.zeros((), jnp.int32)
    else:
        slot = cache.length
        key_segments = jax.lax.dynamic_update_slice(cache.segment_ids, new_segments, (0, slot))
    with jax.named_scope("embed"):
        hidden = jnp.take(base.embedding[...], tokens, axis=0, mode="clip")
        frequencies = ops.rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        cos, sin = ops.rope_tables(positions, frequencies)
        mask = ops.attention_mask(segment_ids, key_segments, slot + prefixed)

    def run_layer(hidden: Array, inputs: tuple) -> tuple[Array, tuple[Route | None, LayerCache | None]]:
        index, layer, params, weights, layer_cache = inputs
        route = prefix = None
        if method is not None and members is not None:
            with jax.named_scope("route"):
                depth = index.astype(jnp.float32) / config.num_layers
                route = method.route(params, hidden, members, depth)
            with jax.named_scope("prefix"):
                prefix = method.prefix(params, hidden, members, lambda soft: _keys_of(config, layer, soft))
        if route is not None:
            weights = route.weights
        layer_key = None if key is None else jax.random.fold_in(key, index)
        adapted = AdaptedLayer(layer, adapter, params, _per_token(weights, segment_ids), layer_key)
        hidden, layer_cache = block(config, adapted, hidden, cos, sin, mask, layer_cache, slot, prefix)
        return hidden, (route, layer_cache)

    inputs = (
        _indices(config.num_layers) if unrolled else jnp.arange(config.num_layers),
        base.layers,
        None if adapter is None else adapter.params if unrolled else adapter.method.settle(adapter.params),
        route_weights,
        None if cache is None else cache.layers,
    )
    hidden, (route, layers) = _over_layers(run_layer, hidden, inputs, unrolled)
    hidden = ops.rms_norm(hidden, base.final_norm[...], config.norm_eps)
    if cache is not None:
        cache = KVCache(layers=layers, segment_ids=key_segments, length=slot + new_segments.shape[1])
    return Output(hidden=hidden, route=route, cache=cache)


@dataclasses.dataclass(frozen=True)
class AdaptedLayer:
    """One frozen layer with one layer's adapter at work on it, or with none.

    Attributes:
      weights: routing weights per row or per token.
      key: present while training with dropout.
    """

    layer: Layer
    adapter: Adapter | None
    params: PyTree
    weights: Array | None
    key: Array | None

    def project(self, place: int, x: Float[Array, "B T _"]) -> tuple[Float[Array, "B T _"], ...]:
        """The adapted outputs of a projection group, by its place in ``types.GROUPS``."""
        names = GROUPS[place]
        modules = [getattr(self.layer, name) for name in names]
        outputs = tuple(module(x) for module in modules)
        if self.adapter is None:
            return outputs
        frozen = tuple(
            Frozen(module.kernel[...], None if module.bias is None else module.bias[...])
            for module in modules
        )
        key = None if self.key is None else jax.random.fold_in(self.key, place)
        group = ProjectionGroup(names, x, outputs, frozen, self.weights, key)
        return self.adapter.method.adapt(self.params, group)

    def beside(
        self, sublayer: str, x: Float[Array, "B T D"], output: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """A sublayer's output with what the method adds beside the sublayer."""
        added = None if self.adapter is None else self.adapter.method.branch(self.params, sublayer, x)
        return output if added is None else output + added


def block(
    config: ModelConfig,
    adapted: AdaptedLayer,
    hidden: Float[Array, "B T D"],
    cos: Float[Array, "B T 1 half"],
    sin: Float[Array, "B T 1 half"],
    mask: Bool[Array, "B T S"],
    cache: LayerCache | None,
    slot: Int[Array, ""],
    prefix: tuple[Float[Array, "B P KH"], Float[Array, "B P KH"]] | None = None,
) -> tuple[Float[Array, "B T D"], LayerCache | None]:
    """One decoder layer: attention and feed-forward, each behind a norm and added to the stream.

    Args:
      slot: where this pass's keys and values go in the cache.
      prefix: keys and values that go before the tokens'.
    """
    rows, length, _ = hidden.shape
    layer = adapted.layer

    def heads(x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1, config.head_dim)

    with jax.named_scope("attention"):
        normed = ops.rms_norm(hidden, layer.attention_norm[...], config.norm_eps)
        q, k, v = adapted.project(0, normed)
        q, k, v = ops.apply_rope(heads(q), cos, sin), ops.apply_rope(heads(k), cos, sin), heads(v)
        if prefix is not None:
            k, v = (jnp.concatenate([heads(p), own], axis=1) for p, own in zip(prefix, (k, v), strict=True))
        if cache is not None:
            cache = cache.write(k, v, slot)
            k, v = cache.k, cache.v
        (x,) = adapted.project(1, ops.attention(q, k, v, mask).reshape(rows, length, -1))
        hidden = hidden + adapted.beside("attention", normed, x)
    with jax.named_scope("feedforward"):
        normed = ops.rms_norm(hidden, layer.feedforward_norm[...], config.norm_eps)
        (x,) = adapted.project(3, ops.swiglu(*adapted.project(2, normed)))
        return hidden + adapted.beside("feedforward", normed, x), cache


def unembed(base: Base, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Logits in float32 from the normed residual stream."""
    if base.head is None:
        return jnp.einsum("...D,VD->...V", hidden, base.embedding[...], preferred_element_type=jnp.float32)
    return jnp.einsum("...D,DV->...V", hidden, base.head[...], preferred_element_type=jnp.float32)


def _indices(count: int) -> tuple[Array, ...]:
    return tuple(jnp.asarray(i, jnp.int32) for i in range(count))


def _keys_of(
    config: ModelConfig, layer: Layer, soft: Float[Array, "B P D"]
) -> tuple[Float[Array, "B P KH"], Float[Array, "B P KH"]]:
    """Keys, not rotated, and values that a frozen layer makes of soft tokens."""
    normed = ops.rms_norm(soft, layer.attention_norm[...], config.norm_eps)
    return layer.k(normed), layer.v(normed)


def _per_token(weights: Array | None, segment_ids: Array) -> Array | None:
    """Routing weights for each token of each row: ``[B, 1, E]`` or, with packed rows, ``[B, T, E]``."""
    if weights is None or weights.shape[-2] == 1:
        return weights
    record = jnp.maximum(segment_ids - 1, 0)[..., None]
    return jnp.take_along_axis(weights, record, axis=1, mode="clip")


def _over_layers(step: Callable, carry: Array, inputs: tuple, unrolled: bool) -> tuple[Array, Any]:
    """Run ``step`` over the layers: ``lax.scan`` on stacked trees, a Python loop on tuples.

    Both give ``(carry, outputs)`` with the routes stacked; a tuple of caches stays a tuple.
    """
    if not unrolled:
        return jax.lax.scan(step, carry, inputs)
    routes, caches = [], []
    indices, layers, params, weights, layer_caches = inputs
    for i, index in enumerate(indices):
        taken = tuple(None if tree is None else tree[i] for tree in (params, weights, layer_caches))
        carry, (route, cache) = step(carry, (index, layers[i], *taken))
        routes.append(route)
        caches.append(cache)
    route = None if routes[0] is None else jax.tree.map(lambda *leaves: jnp.stack(leaves), *routes)
    return carry, (route, tuple(caches))
