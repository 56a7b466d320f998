"""The frozen leaves of a Transformer, as a typed pytree.

The modules are Flax NNX modules that only hold leaves: functions do the work, and only ``jax.*`` transforms
are applied to them. There are two layouts of the layers: one :class:`Layer` whose leaves are stacked on a
leading axis, which training scans over, and a tuple with one entry per layer, which decoding unrolls. In the
tuple the matrices that share an input may be joined (:class:`JoinedLayer`), so that a layer is four matrix
products instead of seven.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, Sharding

from milora_jax.adapters.inputs import Frozen, Kernels
from milora_jax.base import quantized
from milora_jax.base.attention import DeviceLayout
from milora_jax.shapes import Array, Float
from milora_jax.types import EXPERTS, FEEDFORWARD, GROUPS, unstack_layers


class Linear(nnx.Module):
    """A linear map.

    Attributes:
      kernel: ``[*L, d_in, d_out]``; codes, if there are scales.
      bias: ``[*L, d_out]`` or None.
      scales: scales of a quantised kernel, ``[*L, blocks, d_out]``, see ``base.quantized``; else None.
    """

    def __init__(self, kernel: Any, bias: Any, scales: Any = None) -> None:
        self.kernel = nnx.Param(kernel)
        self.bias, self.scales = _param(bias), _param(scales)

    def __call__(self, x: Float[Array, "*B d_in"]) -> Float[Array, "*B d_out"]:
        """Apply the map to ``x``."""
        kernel = self.kernel[...]
        y = x @ kernel if self.scales is None else quantized.product(x, kernel, self.scales[...])
        return y if self.bias is None else y + jnp.broadcast_to(self.bias[...], y.shape)

    def dense(self, dtype: jnp.dtype) -> Float[Array, "*L d_in d_out"]:
        """The kernel's values: unchanged, or decoded in ``dtype``."""
        kernel = self.kernel[...]
        return kernel if self.scales is None else quantized.decode(kernel, self.scales[...], dtype)

    def frozen(self, dtype: jnp.dtype) -> Frozen:
        """The leaves in the form that methods read."""
        return Frozen(self.dense(dtype), None if self.bias is None else self.bias[...])


class Norms(nnx.Module):
    """The RMS weights of one decoder layer, or of all layers; None where a family has no such norm.

    Attributes:
      attention, feedforward: before the two sublayers, ``[*L, D]``.
      attention_post, feedforward_post: after them, ``[*L, D]``.
      query, key: over every head, ``[*L, H]``.
    """

    def __init__(
        self,
        attention: Any,
        feedforward: Any,
        attention_post: Any = None,
        feedforward_post: Any = None,
        query: Any = None,
        key: Any = None,
    ) -> None:
        self.attention, self.feedforward = nnx.Param(attention), nnx.Param(feedforward)
        self.attention_post, self.feedforward_post = _param(attention_post), _param(feedforward_post)
        self.query, self.key = _param(query), _param(key)


def _param(value: Any) -> nnx.Param | None:
    return None if value is None else nnx.Param(value)


class Experts(nnx.Module):
    """The feed-forward experts of one layer, or of all layers on a leading axis, and their router.

    The kernels have the axis of the experts before the last two, ``[*L, X, d_in, d_out]``.

    Attributes:
      router: ``[*L, D, X]``.
      gate, up: kernels of the two modules that read the stream; None where they are joined.
      gate_up: both, side by side; else None.
      down: kernels of the third.
      layout: how rows and experts are divided over several devices, see ``base.experts``; None leaves it to
        XLA.
    """

    def __init__(
        self, router: Any, into: tuple[Linear, ...], down: Linear, layout: DeviceLayout | None = None
    ) -> None:
        self.router = nnx.Param(router)
        self.gate, self.up, self.gate_up = (*into, None) if len(into) == 2 else (None, None, *into)
        self.down = down
        self.layout = layout

    @property
    def into(self) -> tuple[Linear, ...]:
        """``(gate, up)``, or the two in one."""
        return tuple(each for each in (self.gate, self.up, self.gate_up) if each is not None)

    def joined(self) -> Experts:
        """The same with gate and up side by side, for decoding."""
        both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *self.into)
        return Experts(self.router[...], (both,), self.down, self.layout)


class Layer(nnx.Module):
    """The leaves of one decoder layer, or of all layers on a leading axis.

    Attributes:
      norms: norms of the layer.
      q, k, v, o, gate, up, down: the seven linear modules of ``types.EXPERTS``; the last three are None in a
        base with experts.
      experts: experts of the layer; None in a dense base.
    """

    def __init__(self, norms: Norms, modules: dict[str, Linear], experts: Experts | None = None) -> None:
        self.norms = norms
        self.q, self.k, self.v, self.o = (modules[name] for name in ("q", "k", "v", "o"))
        self.gate, self.up, self.down = (modules.get(name) for name in FEEDFORWARD)
        self.experts = experts

    def project(self, place: int, x: Float[Array, "B T _"]) -> tuple[Float[Array, "B T _"], ...]:
        """The frozen outputs of a projection group, by its place in ``types.GROUPS``."""
        return tuple(getattr(self, name)(x) for name in GROUPS[place])

    def frozen(self, place: int) -> tuple[Frozen, ...]:
        """The leaves of a projection group, module by module."""
        dtype = self.norms.attention[...].dtype
        return tuple(getattr(self, name).frozen(dtype) for name in GROUPS[place])


class JoinedLayer(nnx.Module):
    """The leaves of one decoder layer, with the modules of each projection group joined side by side.

    Attributes:
      norms: norms of the layer.
      qkv, o, gate_up, down: the four groups of ``types.GROUPS``; the last two are None in a base with
        experts.
      widths: output widths of the modules of each group.
      experts: experts of the layer, their gate and up joined; None in a dense base.
    """

    def __init__(
        self,
        norms: Norms,
        groups: tuple[Linear, ...],
        widths: tuple[tuple[int, ...], ...],
        experts: Experts | None = None,
    ) -> None:
        self.norms = norms
        self.qkv, self.o = groups[:2]
        self.gate_up, self.down = groups[2:] or (None, None)
        self.widths = widths
        self.experts = experts

    def project(self, place: int, x: Float[Array, "B T _"]) -> tuple[Float[Array, "B T _"], ...]:
        """The frozen outputs of a projection group, from one matrix product."""
        return self._split(place, self._group(place)(x))

    def frozen(self, place: int) -> tuple[Frozen, ...]:
        """The leaves of a projection group, module by module, as slices of the joined ones."""
        kernel, bias = self._group(place).frozen(self.norms.attention[...].dtype)
        kernels = self._split(place, kernel)
        biases = (None,) * len(kernels) if bias is None else self._split(place, bias)
        return tuple(Frozen(kernel, bias) for kernel, bias in zip(kernels, biases, strict=True))

    @property
    def matrices(self) -> tuple[Linear, ...]:
        """The four groups of ``types.GROUPS``; of a base with experts the last two are those of all
        experts.
        """
        if self.experts is None:
            return self.groups
        return (*self.groups, *self.experts.into, self.experts.down)

    @property
    def groups(self) -> tuple[Linear, ...]:
        """The groups that the layer has, in the order of ``types.GROUPS``."""
        return tuple(group for group in (self.qkv, self.o, self.gate_up, self.down) if group is not None)

    def _group(self, place: int) -> Linear:
        return self.groups[place]

    def _split(self, place: int, joined: Array) -> tuple[Array, ...]:
        edges = list(accumulate(self.widths[place]))[:-1]
        return tuple(jnp.split(joined, edges, axis=-1))


class Base(nnx.Module):
    """The whole frozen model.

    Attributes:
      embedding: ``[V, D]``.
      layers: one stacked Layer, or a tuple of L Layers or JoinedLayers.
      final_norm: ``[D]``.
      head: ``[D, V]``, or None where the embedding is tied to it.
    """

    def __init__(self, embedding: Any, layers: Any, final_norm: Any, head: Any) -> None:
        self.embedding = nnx.Param(embedding)
        self.layers = nnx.data(layers)
        self.final_norm = nnx.Param(final_norm)
        self.head = _param(head)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the leaves, in which activations are computed."""
        return self.embedding[...].dtype

    @property
    def devices(self) -> set[Any]:
        """The devices that hold the leaves."""
        return self.embedding[...].devices()

    @property
    def everywhere(self) -> Sharding:
        """The sharding of a leaf that each of these devices holds whole."""
        sharding = self.embedding[...].sharding
        return NamedSharding(sharding.mesh, jax.P()) if isinstance(sharding, NamedSharding) else sharding

    @property
    def unrolled(self) -> bool:
        """Whether the layers are a tuple, as in the layout for decoding."""
        return isinstance(self.layers, tuple)


def ends_of(base: Base) -> Base:
    """The base without its layers: what embeds tokens and gives logits."""
    return Base(base.embedding[...], (), base.final_norm[...], None if base.head is None else base.head[...])


def unroll(base: Base) -> Base:
    """Convert the layers to a tuple."""
    head = None if base.head is None else base.head[...]
    return Base(base.embedding[...], unstack_layers(base.layers), base.final_norm[...], head)


def decode_layout(base: Base) -> Base:
    """Convert the layers to a tuple of joined layers, for decoding.

    A base on several devices keeps its modules apart, because the parts of a joined matrix would have to be
    sent between devices.
    """
    base = unroll(base)
    if len(base.devices) == 1:
        base.layers = nnx.data(tuple(joined_layer(layer) for layer in base.layers))
    return base


def joined_layer(layer: Layer) -> JoinedLayer:
    """Join the modules of each projection group of one layer side by side."""
    groups, widths = [], []
    for names in GROUPS:
        modules = [getattr(layer, name) for name in names]
        if None in modules:
            continue
        # The output axis is the last one of every leaf.
        groups.append(jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *modules))
        widths.append(tuple(module.kernel[...].shape[-1] for module in modules))
    experts = None if layer.experts is None else layer.experts.joined()
    return JoinedLayer(layer.norms, tuple(groups), tuple(widths), experts)


def frozen_kernels(base: Base) -> Kernels:
    """The stacked kernels ``[L, d_in, d_out]`` of the seven modules, from which a method may start.

    Those of a quantised base are decoded; inside a jitted function only the kernels that are read are
    decoded. A base with experts has no single kernel of gate, up and down, and no method that starts from
    kernels.
    """
    modules = {name: getattr(base.layers, name) for name in EXPERTS}
    return {name: module.dense(base.dtype) for name, module in modules.items() if module is not None}
