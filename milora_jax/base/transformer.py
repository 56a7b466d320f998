"""The forward pass of a decoder-only Transformer, with hooks at which an adapter may act.

Layers are stacked on a leading axis and run by ``jax.lax.scan`` (training compiles one layer), or a tuple and
unrolled (decoding copies no slices).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from milora_jax.adapters.inputs import LayerInput, ProjectionGroup
from milora_jax.adapters.protocol import Adapter
from milora_jax.base import ops
from milora_jax.base.attention import Attend, attention
from milora_jax.base.attention_context import AttentionContext, scoring_of
from milora_jax.base.cache import BeamCache, BeamLayerCache, KVCache, LayerCache, SlotLayerCache
from milora_jax.base.experts import through_experts
from milora_jax.base.modules import Base, JoinedLayer, Layer, unroll
from milora_jax.model_config import ModelConfig
from milora_jax.shapes import Array, Float, Int, Key
from milora_jax.types import GROUPS, KEPT, Batch, PyTree, Route, kept, stack_layers, unstack_layers

POLICIES = {
    "products": jax.checkpoint_policies.save_only_these_names(KEPT),
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What is kept for the backward pass of a layer, for the values of ``config.REMAT`` that wrap layers."""


@struct.dataclass
class Output:
    """The result of a forward pass.

    Attributes:
      hidden: residual stream after the final norm; ``unembed`` turns it into logits.
      route: the route, ``[L, B, Z, E]``, if this pass computed it.
      cache: the cache with this pass's tokens in it, if one was given.
      inspected: results of ``inspect`` for each layer's input, on a leading layer axis.
    """

    hidden: Float[Array, "B T D"]
    route: Route | None
    cache: KVCache | BeamCache | None
    inspected: PyTree = None


def adapter_decode_layout(adapter: Adapter, base: Base) -> Adapter:
    """Settle an adapter and prepare it for decoding on ``base``, with its layers as a tuple.

    Args:
      base: in either layout.
    """
    layers = base.layers if base.unrolled else unroll(base).layers
    params = unstack_layers(adapter.method.settle(adapter.params))
    prepared = tuple(
        adapter.method.prepare(mine, layer.frozen, base.dtype)
        for mine, layer in zip(params, layers, strict=True)
    )
    return dataclasses.replace(adapter, params=prepared)


def forward(
    base: Base,
    config: ModelConfig,
    batch: Batch,
    *,
    adapter: Adapter | None = None,
    route: PyTree = None,
    top_k: Int[Array, ""] | None = None,
    inspect: Callable[[LayerInput], PyTree] | None = None,
    cache: KVCache | BeamCache | None = None,
    cache_length: int = 0,
    key: Key[Array, ""] | None = None,
    noise: Float[Array, "B T D"] | None = None,
    remat: str = "none",
    attend: Attend = attention,
) -> Output:
    """Run the model over the tokens of a batch.

    A pass without ``cache`` is the first over its records: unless a ``route`` is given, every layer routes on
    the batch's prompts and the route is returned, and a method's prefix goes before the tokens. A pass with a
    cache continues an earlier one: it takes that pass's route, finds the prefix in the cache, and has no
    router.

    Args:
      adapter: the adapter of the layers, in the layout of the base's; None is the plain base.
      route: routing weights of an earlier pass, ``[L, B, Z, E]`` or a tuple of L ``[B, Z, E]``.
      top_k: number of experts of a route, where a schedule sets another than the method.
      inspect: called with the input of each layer of a first pass, for measuring.
      cache: keys and values of earlier tokens, to which this pass's are appended, row by row. Every token
        counts: such a pass has no padding.
      cache_length: S of the cache that a first pass fills, at least P + T; 0 for none. Its rows hold one
        record each and are padded on the right.
      key: random key of dropout; None switches dropout off.
      noise: added to the embeddings of the tokens.
      remat: what the backward pass computes again, one of ``config.REMAT``.
      attend: the attention function of a first pass.

    Raises:
      ValueError: an adapter with a router continues a pass without that pass's route, or a pass with a cache
        is asked for what only a first pass does.
    """
    method, first = None if adapter is None else adapter.method, cache is None
    if not first and method is not None and method.routes and route is None:
        raise ValueError("an adapter with a router continues a pass with that pass's route")
    if not first and (inspect is not None or cache_length):
        raise ValueError("a pass with a cache is not the first: it takes neither inspect nor cache_length")
    routing = first and method is not None and method.routes and route is None
    prefix_length = method.prefix_length if first and method is not None else 0
    segment_ids, members = batch.segment_ids, batch.members if first else None
    with jax.named_scope("embed"):
        hidden = embed(base, config, batch.tokens, noise)
        context = AttentionContext.of(config, batch, prefix_length, cache)
    slides = config.slides

    def run_layer(hidden: Array, inputs: tuple) -> tuple[Array, tuple[Route | None, Any, Any]]:
        index, sliding, layer, params, weights, layer_cache = inputs
        sliding = slides[0] if sliding is None else sliding
        computed = prefix = inspected = None
        if members is not None:
            normed = input_norm(config, layer, hidden)
            depth = index.astype(jnp.float32) / config.num_layers
            entering = LayerInput(hidden, normed, members, depth)
            inspected = None if inspect is None else inspect(entering)
        if method is not None and routing:
            with jax.named_scope("route"):
                computed = method.route(params, entering, top_k)
            weights = None if computed is None else computed.weights
        if method is not None and members is not None and prefix_length:
            with jax.named_scope("prefix"):
                made = method.prefix(params, hidden, members, lambda soft: keys_of(config, layer, soft))
                prefix = None if made is None else _per_answer(made, batch, prefix_length)
        layer_key = None if key is None else jax.random.fold_in(key, index)
        adapted = AdaptedLayer(layer, adapter, params, _per_token(weights, batch), layer_key)
        past = None if cache is None else Past(layer_cache, cache.place, context.cached(sliding))

        def attend_own(q: Array, k: Array, v: Array) -> Array:
            segments = None if prefix_length else segment_ids
            return attend(q, k, v, context.mask, scoring_of(config), segments, context.window(sliding))

        hidden, new = block(config, adapted, hidden, context.angles(sliding), attend_own, past, prefix)
        if first:
            new = new.padded(cache_length) if cache_length else None
        return hidden, (computed, new, inspected)

    inputs = (
        jnp.arange(config.num_layers) if not base.unrolled else _indices(config.num_layers),
        None if len(set(slides)) == 1 else slides if base.unrolled else jnp.asarray(slides),
        base.layers,
        None
        if adapter is None
        else adapter.params
        if base.unrolled
        else adapter.method.settle(adapter.params),
        route,
        None if cache is None else cache.layers,
    )
    layer_step = run_layer
    if remat in POLICIES:
        layer_step = jax.checkpoint(run_layer, policy=POLICIES[remat], prevent_cse=base.unrolled)
    hidden, (computed, layers, inspected) = _over_layers(layer_step, hidden, inputs, base.unrolled)
    hidden = final_norm(base, config, hidden)
    if cache is not None:
        cache = cache.after(layers, batch.tokens.shape[1])
    elif cache_length:
        written = batch.prompts * prefix_length + (segment_ids > 0).sum(axis=1, dtype=jnp.int32)
        cache = KVCache(layers=layers, length=written)
    return Output(hidden=hidden, route=computed, cache=cache, inspected=inspected)


@dataclasses.dataclass(frozen=True)
class Past:
    """The state of earlier passes that a layer uses.

    Attributes:
      cache: keys and values of earlier passes.
      place: where this pass's are written.
      mask: which of them a query sees.
    """

    cache: LayerCache | SlotLayerCache | BeamLayerCache
    place: Any
    mask: Any


@dataclasses.dataclass(frozen=True)
class AdaptedLayer:
    """One frozen layer with its layer of the adapter, if there is an adapter.

    Attributes:
      weights: routing weights per row or per token.
      key: random key of dropout; None without dropout.
    """

    layer: Layer | JoinedLayer
    adapter: Adapter | None
    params: PyTree
    weights: Array | None
    key: Array | None

    def project(self, place: int, x: Float[Array, "B T _"]) -> tuple[Float[Array, "B T _"], ...]:
        """The adapted outputs of a projection group, by its place in ``types.GROUPS``."""
        return kept(self._adapted(place, x, self.layer.project(place, x)))

    def feedforward(self, x: Float[Array, "B T D"], config: ModelConfig) -> Float[Array, "B T D"]:
        """The adapted feed-forward layer, without what is beside it."""
        experts = self.layer.experts
        if experts is None:
            gate, up = self.project(2, x)
            (output,) = self.project(3, ops.gated(gate, up, config.activation))
            return output
        changes = None
        if self.adapter is not None:
            if not self.adapter.method.additive:
                raise ValueError(f"method {self.adapter.method.name!r} cannot change a base with experts")
            # All experts share one term per module, which does not depend on the output it is added to.
            nothing = jnp.zeros((*x.shape[:2], config.intermediate_size), x.dtype)
            changes = self._adapted(2, x, (nothing, nothing))
        output, hidden = through_experts(config, experts, x, changes)
        if self.adapter is None:
            return output
        # Weighted sums of hidden states and of outputs: a linear term of every expert is one of the sums.
        (output,) = kept(self._adapted(3, hidden, (output,)))
        return output

    def _adapted(self, place: int, x: Array, outputs: tuple[Array, ...]) -> tuple[Array, ...]:
        if self.adapter is None:
            return outputs
        key = None if self.key is None else jax.random.fold_in(self.key, place)
        frozen = () if self.layer.experts is not None and place > 1 else self.layer.frozen(place)
        group = ProjectionGroup(GROUPS[place], x, outputs, frozen, self.weights, key)
        return self.adapter.method.adapt(self.params, group)

    def beside(
        self, sublayer: str, x: Float[Array, "B T D"], output: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """Add the method's branch to a sublayer's output."""
        added = None if self.adapter is None else self.adapter.method.branch(self.params, sublayer, x)
        return output if added is None else output + added


def block(
    config: ModelConfig,
    adapted: AdaptedLayer,
    hidden: Float[Array, "B T D"],
    angles: tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]],
    attend_own: Callable[[Array, Array, Array], Array] | None,
    past: Past | None = None,
    prefix: tuple[Float[Array, "B P KH"], Float[Array, "B P KH"]] | None = None,
) -> tuple[Float[Array, "B T D"], Any]:
    """One decoder layer: attention and feed-forward, each after a norm and added to the stream.

    Args:
      angles: cosine and sine of the rotary embedding.
      attend_own: attention over this pass's own queries, keys and values, where ``past`` is None.
      prefix: keys and values that go before those of the tokens.

    Returns:
      The stream, and this pass's keys and values, or with ``past`` the cache that includes them.
    """
    rows, length, _ = hidden.shape
    layer = adapted.layer
    norms = layer.norms
    cos, sin = angles

    def heads(x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1, config.head_dim)

    with jax.named_scope("attention"):
        normed = _norm(config, hidden, norms.attention)
        q, k, v = adapted.project(0, normed)
        q, k, v = _normed_heads(config, q, norms.query), _normed_heads(config, k, norms.key), heads(v)
        q, k = (ops.apply_rope(x, cos, sin) for x in (q, k))
        if past is not None:
            cache = past.cache.write(k, v, past.place)
            attended = cache.attend(q, past.mask, scoring_of(config))
        elif attend_own is None:
            raise ValueError("a first pass needs attention over its own keys and values")
        else:
            if prefix is not None:
                k, v = (
                    jnp.concatenate([heads(p), own], axis=1) for p, own in zip(prefix, (k, v), strict=True)
                )
            attended, cache = attend_own(q, k, v), LayerCache.of(k, v)
        (x,) = adapted.project(1, attended.reshape(rows, length, -1))
        x = _norm(config, x, norms.attention_post)
        hidden = hidden + adapted.beside("attention", normed, x)
    with jax.named_scope("feedforward"):
        normed = _norm(config, hidden, norms.feedforward)
        x = adapted.feedforward(normed, config)
        x = _norm(config, x, norms.feedforward_post)
        return hidden + adapted.beside("feedforward", normed, x), cache


def _norm(config: ModelConfig, x: Float[Array, "*B D"], weight: Any) -> Float[Array, "*B D"]:
    """Apply a norm of a layer; return ``x`` where the family has no such norm."""
    return x if weight is None else ops.rms_norm(x, weight[...], config.norm_eps, config.norm_unit_offset)


def _normed_heads(config: ModelConfig, x: Float[Array, "B T NH"], weight: Any) -> Float[Array, "B T N H"]:
    """Queries or keys by head, after the norm of each head or of all together, where the family has one."""
    x = _norm(config, x, weight) if config.qk_norm_all_heads else x
    x = x.reshape(*x.shape[:2], -1, config.head_dim)
    return x if config.qk_norm_all_heads else _norm(config, x, weight)


def embed(
    base: Base, config: ModelConfig, tokens: Int[Array, "B T"], noise: Float[Array, "B T D"] | None = None
) -> Float[Array, "B T D"]:
    """The residual stream before the first layer; noise is added before a family's scale."""
    hidden = jnp.take(base.embedding[...], tokens, axis=0, mode="clip")
    hidden = hidden if noise is None else hidden + noise.astype(hidden.dtype)
    return hidden * jnp.asarray(config.hidden_size**0.5, hidden.dtype) if config.scale_embedding else hidden


def input_norm(
    config: ModelConfig, layer: Layer | JoinedLayer, hidden: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
    """The stream behind a layer's own input norm, where the family has one there."""
    return _norm(config, hidden, layer.norms.attention)


def final_norm(base: Base, config: ModelConfig, hidden: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """The residual stream after the norm behind the last layer, as :func:`unembed` takes it."""
    return _norm(config, hidden, base.final_norm)


def unembed(base: Base, config: ModelConfig, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Logits in float32 from the normed residual stream."""
    product, head = ("...D,VD->...V", base.embedding) if base.head is None else ("...D,DV->...V", base.head)
    logits = jnp.einsum(product, hidden, head[...], preferred_element_type=jnp.float32)
    return ops.softcap(logits, config.final_softcap)


def _indices(count: int) -> tuple[Array, ...]:
    return tuple(jnp.asarray(i, jnp.int32) for i in range(count))


def keys_of(
    config: ModelConfig, layer: Layer | JoinedLayer, soft: Float[Array, "B P D"]
) -> tuple[Float[Array, "B P KH"], Float[Array, "B P KH"]]:
    """Keys, not rotated, and values of soft tokens in a frozen layer."""
    _, k, v = layer.project(0, _norm(config, soft, layer.norms.attention))
    return _normed_heads(config, k, layer.norms.key).reshape(k.shape), v


def _per_token(weights: Array | None, batch: Batch) -> Array | None:
    """Routing weights of each token of each row: ``[B, 1, E]`` or, with packed rows, ``[B, T, E]``."""
    if weights is None or weights.shape[-2] == 1:
        return weights
    record = jnp.maximum(batch.segment_ids - 1, 0)[..., None]
    prompt = record // batch.answers if batch.answers > 1 else record
    return jnp.take_along_axis(weights, prompt, axis=1, mode="clip")


def _per_answer(
    prefix: tuple[Float[Array, "B ZP KH"], Float[Array, "B ZP KH"]], batch: Batch, prefix_length: int
) -> tuple[Float[Array, "B ZAP KH"], Float[Array, "B ZAP KH"]]:
    """A prefix for every answer: the answers to a prompt have equal ones."""
    if batch.answers == 1:
        return prefix

    def repeated(values: Array) -> Array:
        rows, _, width = values.shape
        of_prompt = values.reshape(rows, batch.prompts, prefix_length, width)
        return jnp.repeat(of_prompt, batch.answers, axis=1).reshape(rows, -1, width)

    keys, values = prefix
    return repeated(keys), repeated(values)


def _over_layers(step: Callable, carry: Array, inputs: tuple, unrolled: bool) -> tuple[Array, Any]:
    """Run ``step`` over the layers: ``lax.scan`` on stacked trees, a Python loop on tuples.

    Both return ``(carry, outputs)`` with the routes and inspected values stacked; a tuple of caches stays a
    tuple.
    """
    if not unrolled:
        return jax.lax.scan(step, carry, inputs)
    routes, caches, inspected = [], [], []
    index, slides, *rest = inputs
    # Layers of a kind are traced once, and are one function of the program until XLA puts it into place.
    steps = {
        kind: jax.jit(lambda carry, number, parts, kind=kind: step(carry, (number, kind, *parts)))
        for kind in {*(slides or [None])}
    }
    for i, number in enumerate(index):
        parts = tuple(None if part is None else part[i] for part in rest)
        carry, found = steps[slides[i] if slides else None](carry, number, parts)
        for values, value in zip((routes, caches, inspected), found, strict=True):
            values.append(value)
    return carry, (stack_layers(tuple(routes)), tuple(caches), stack_layers(tuple(inspected)))
