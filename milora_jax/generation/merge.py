"""Merge on prefill: fold a prompt's chosen experts into a private copy of the weights they change.

For one long stream: after that every token costs what the base costs. It holds a second copy of the
matrices that the route touches, decoded where the base is quantised, and a merged weight is rounded to the
base's dtype, so in bfloat16 the tokens may differ from those of the unmerged adapter.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from milora_jax.adapters.inputs import ProjectionGroup
from milora_jax.adapters.joined import JoinedPairs
from milora_jax.adapters.protocol import Adapter
from milora_jax.base.modules import Base, Experts, JoinedLayer, Linear
from milora_jax.errors import UserError
from milora_jax.shapes import Array, Float
from milora_jax.types import EXPERTS, GROUPS


def merged_base(base: Base, adapter: Adapter, route: np.ndarray | None) -> Base:
    """Return the base with one prompt's adapter in its weights; unchanged weights are shared.

    Args:
      base: in the decode layout, its groups joined.
      adapter: prepared for decoding, of a method that is made of low-rank pairs.
      route: routing weights ``[L, E]`` of the prompt; None without a router.

    Raises:
      UserError: for a method that is more than pairs, or a base whose groups are apart.
    """
    if not adapter.method.is_pairs:
        raise UserError(f"method {adapter.method.name!r} cannot be merged: it is more than low-rank pairs")
    if not all(isinstance(layer, JoinedLayer) for layer in base.layers):
        raise UserError("only a base on a single device can be merged into")
    weights = np.ones((len(base.layers), len(EXPERTS))) if route is None else route
    layers = tuple(
        _merged_layer(layer, adapter, params, row)
        for layer, params, row in zip(base.layers, adapter.params, weights, strict=True)
    )
    head = None if base.head is None else base.head[...]
    return Base(base.embedding[...], layers, base.final_norm[...], head)


def _merged_layer(layer: JoinedLayer, adapter: Adapter, params: object, weights: np.ndarray) -> JoinedLayer:
    groups = []
    for place, names in enumerate(GROUPS):
        frozen = layer.matrices[place]
        mine = np.array([weights[EXPERTS.index(name)] for name in names], np.float32)
        if not mine.any():
            groups.append(frozen)
            continue
        nothing = jnp.zeros((1, 1, 1))
        shares = jnp.asarray(weights, jnp.float32)[None, None]
        group = ProjectionGroup(names, nothing, (), (), shares, None)
        pairs, _ = adapter.method.pairs_of(params, group)
        kernel = _merged(frozen.dense(layer.norms.attention[...].dtype), pairs, mine)
        groups.append(Linear(kernel, None if frozen.bias is None else frozen.bias[...]))
    if layer.experts is None:
        return JoinedLayer(layer.norms, tuple(groups), layer.widths)
    *attention, into, down = groups
    experts = Experts(layer.experts.router[...], (into,), down)
    return JoinedLayer(layer.norms, tuple(attention), layer.widths, experts)


@jax.jit
def _merged(
    kernel: Float[Array, "*X d_in d_out"], pairs: JoinedPairs, shares: Float[Array, " M"]
) -> Float[Array, "*X d_in d_out"]:
    """``W + sum_i share_i A_i B_i``, the sum in float32; all experts of a base get the same change."""
    wide = dataclasses.replace(pairs, a=pairs.a.astype(jnp.float32), b=pairs.b.astype(jnp.float32))
    a = wide.a.reshape(wide.a.shape[0], len(pairs.tiles), pairs.rank) * shares[None, :, None]
    changes = wide.widen(a[:, None])
    change = jnp.concatenate(changes, axis=-1)[:, 0]
    change = jnp.broadcast_to(change, kernel.shape)
    return (kernel.astype(jnp.float32) + change).astype(kernel.dtype)
