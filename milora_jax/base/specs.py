"""The tensors of a Hugging Face directory that fill the leaves of a base: a table of names and shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import jax.numpy as jnp
import numpy as np

from milora_jax.base.families import FAMILIES
from milora_jax.base.modules import Base, Experts, JoinedLayer, Layer, Linear, Norms
from milora_jax.base.quantized import SCHEMES, Scheme
from milora_jax.model_config import ModelConfig
from milora_jax.types import EXPERTS, FEEDFORWARD, GROUPS

MODULE_PATHS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""Names of the seven modules inside a layer of Hugging Face's files."""

FUSED_PATHS = {
    **dict.fromkeys(("q", "k", "v"), "self_attn.qkv_proj"),
    **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj"),
}
"""The same in families that store modules with a common input in one tensor, one after the other."""


NORM_PATHS = {"attention": "input_layernorm", "feedforward": "post_attention_layernorm"}
POST_NORM_PATHS = {
    "attention": "input_layernorm",
    "attention_post": "post_attention_layernorm",
    "feedforward": "pre_feedforward_layernorm",
    "feedforward_post": "post_feedforward_layernorm",
}
"""Names of the norms of a layer; with norms after the sublayers, one name means another place."""

HEAD_NORM_PATHS = {"query": "self_attn.q_norm", "key": "self_attn.k_norm"}


OF_IMAGES = ("vision_tower.", "multi_modal_projector.")


def text_name(name: str) -> str | None:
    """The name of a tensor in a pure language model; None for a tensor of a vision model.

    >>> text_name("language_model.model.norm.weight"), text_name("model.language_model.norm.weight")
    ('model.norm.weight', 'model.norm.weight')
    """
    if name.removeprefix("model.").startswith(OF_IMAGES):
        return None
    return name.removeprefix("language_model.").replace("model.language_model.", "model.", 1)


@dataclass(frozen=True)
class Part:
    """One tensor of the files, and its place in a leaf.

    Attributes:
      name: name in the files.
      layer: index on the leading axis of a stacked leaf.
      expert: index on the axis of the base's experts, behind that of the layers.
      columns: its first column in a joined leaf, and the one after its last.
      outputs: its place in a tensor of several modules: first output, the one after the last, and the number
        of all outputs; None for a tensor of its own.
    """

    name: str
    layer: int | None = None
    columns: tuple[int, int] | None = None
    outputs: tuple[int, int, int] | None = None
    expert: int | None = None

    @property
    def front(self) -> tuple[int, ...]:
        """Its indices on the leading axes of the leaf."""
        return tuple(number for number in (self.layer, self.expert) if number is not None)

    def within(self, box: tuple[slice, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
        """The intersection of this tensor with a box of the leaf, one slice per axis.

        Returns:
          Its slices in the box, and its slices in the tensor in the axis order of the leaf, one axis fewer
          for each of :attr:`front`. None where the intersection is empty.
        """
        count = len(self.front)
        leading, box = box[:count], box[count:]
        if not all(side.start <= i < side.stop for side, i in zip(leading, self.front, strict=True)):
            return None
        at = (i - side.start for side, i in zip(leading, self.front, strict=True))
        place = (*(slice(i, i + 1) for i in at), *(slice(0, side.stop - side.start) for side in box))
        if self.columns is not None:
            *front, asked = box
            first, end = max(asked.start, self.columns[0]), min(asked.stop, self.columns[1])
            if first >= end:
                return None
            place = (*place[:-1], slice(first - asked.start, end - asked.start))
            box = (*front, slice(first - self.columns[0], end - self.columns[0]))
        if self.outputs is not None:
            *front, mine = box
            box = (*front, slice(mine.start + self.outputs[0], mine.stop + self.outputs[0]))
        return place, box


@dataclass(frozen=True)
class Encoded:
    """The part of a quantised kernel in a leaf.

    Attributes:
      scheme: its encoding.
      d_in: rows of the kernel.
      scales: whether the leaf holds the scales instead of the codes.
    """

    scheme: Scheme
    d_in: int
    scales: bool

    @property
    def dtype(self) -> str:
        """The dtype of the leaf."""
        return self.scheme.scales_dtype if self.scales else self.scheme.codes_dtype


@dataclass(frozen=True)
class LeafSpec:
    """One leaf of the base and the tensors that fill it.

    Attributes:
      shape: shape of the leaf.
      parts: the tensors: one per layer for a stacked leaf, one per module for a joined one.
      transposed: whether the files hold it ``[out, in]``.
      encoded: how the tensors' values are encoded; None where they are the leaf's values.
    """

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    transposed: bool = False
    encoded: Encoded | None = None

    def dtype(self, plain: str) -> np.dtype:
        """The dtype of the leaf, in a base whose plain leaves have the dtype ``plain``."""
        return jnp.dtype(plain if self.encoded is None else self.encoded.dtype)

    def rows_read(self, box: tuple[slice, ...]) -> tuple[slice, ...]:
        """The box that must be read for a box of the leaf: all rows, for a quantised kernel."""
        return box if self.encoded is None else (*box[:-2], slice(0, self.encoded.d_in), box[-1])

    def tensor_shape(self, part: Part) -> tuple[int, ...]:
        """Shape of one of the tensors, in the axis order of the leaf."""
        shape = self.shape if self.encoded is None else (*self.shape[:-2], self.encoded.d_in, self.shape[-1])
        shape = shape[len(part.front) :]
        if part.columns is not None:
            shape = (*shape[:-1], part.columns[1] - part.columns[0])
        return shape if part.outputs is None else (*shape[:-1], part.outputs[2])


def base_specs(
    config: ModelConfig, decode: bool = False, quantize: str = "none", joined: bool = True
) -> Base:
    """A Base whose leaves are LeafSpecs, the table of names and shapes.

    Args:
      decode: a tuple of layers, as in ``modules.decode_layout``, instead of a stacked one.
      joined: whether those are joined, as for one device.
      quantize: how the kernels of the layers are stored, one of ``config.QUANTIZE``.

    Raises:
      UserError: the width of a kernel does not suit the quantisation.
    """
    table = _Table(config, quantize)
    vocab, width = config.vocab_size, config.hidden_size
    head = None
    if not config.tie_embeddings:
        head = LeafSpec((width, vocab), (Part("lm_head.weight"),), transposed=True)
    a_layer = table.joined_layer if joined else table.layer
    return Base(
        LeafSpec((vocab, width), (Part("model.embed_tokens.weight"),)),
        tuple(map(a_layer, range(config.num_layers))) if decode else table.stacked_layer(),
        LeafSpec((width,), (Part("model.norm.weight"),)),
        head,
    )


@dataclass(frozen=True)
class _Table:
    """The part of the table for the layers."""

    config: ModelConfig
    quantize: str

    def stacked_layer(self) -> Layer:
        """All layers on a leading axis."""
        modules = {}
        for name in self.dense:
            d_in, d_out = self.config.module_dims[name]

            def stacked(kind: str, *shape: int, name: str = name) -> LeafSpec:
                parts = tuple(self.part(i, name, kind, layer=i) for i in range(self.config.num_layers))
                return LeafSpec((self.config.num_layers, *shape), parts, kind == "weight")

            bias = stacked("bias", d_out) if name in self.config.biased else None
            modules[name] = self.linear(stacked("weight", d_in, d_out), bias)

        def norm(suffix: str, width: int) -> LeafSpec:
            count = self.config.num_layers
            parts = tuple(Part(f"model.layers.{i}.{suffix}.weight", layer=i) for i in range(count))
            return LeafSpec((count, width), parts)

        return Layer(self.norms(norm), modules, self.experts(None))

    def joined_layer(self, layer: int) -> JoinedLayer:
        """One layer with modules that share an input in one leaf."""
        groups, widths = [], []
        for names in GROUPS:
            if names[0] not in self.dense:
                continue
            d_in = self.config.module_dims[names[0]][0]
            outputs = tuple(self.config.module_dims[name][1] for name in names)
            ends = tuple(pairwise((0, *accumulate(outputs))))

            def joined(
                kind: str, *front: int, names: tuple[str, ...] = names, ends: tuple = ends
            ) -> LeafSpec:
                pairs = zip(names, ends, strict=True)
                parts = tuple(self.part(layer, name, kind, columns=columns) for name, columns in pairs)
                return LeafSpec((*front, ends[-1][1]), parts, kind == "weight")

            bias = joined("bias") if names[0] in self.config.biased else None
            groups.append(self.linear(joined("weight", d_in), bias))
            widths.append(outputs)

        experts = self.experts(layer, joined=True)
        return JoinedLayer(self.norms_of(layer), tuple(groups), tuple(widths), experts)

    def layer(self, number: int) -> Layer:
        """One layer with separate modules."""
        modules = {}
        for name in self.dense:
            d_in, d_out = self.config.module_dims[name]
            bias = None
            if name in self.config.biased:
                bias = LeafSpec((d_out,), (self.part(number, name, "bias"),))
            weight = LeafSpec((d_in, d_out), (self.part(number, name, "weight"),), transposed=True)
            modules[name] = self.linear(weight, bias)
        return Layer(self.norms_of(number), modules, self.experts(number))

    @property
    def dense(self) -> tuple[str, ...]:
        """The modules of which a layer has one."""
        return tuple(name for name in EXPERTS if not (self.config.num_experts and name in FEEDFORWARD))

    def experts(self, layer: int | None, joined: bool = False) -> Experts | None:
        """The experts of one layer, or of all layers stacked for None; None in a dense base.

        Args:
          joined: gate and up side by side.
        """
        paths, count = FAMILIES[self.config.family].expert_paths, self.config.num_experts
        if not count or paths is None:
            return None
        stacked = layer is None
        numbers = range(self.config.num_layers) if stacked else (layer,)
        front = (self.config.num_layers,) if stacked else ()

        def kernel(*names: str) -> Linear:
            d_in, outputs = self.config.module_dims[names[0]][0], self.config.module_dims[names[0]][1]
            parts = tuple(
                Part(
                    f"model.layers.{i}.{paths[name].format(expert)}.weight",
                    i if stacked else None,
                    (at * outputs, (at + 1) * outputs) if len(names) > 1 else None,
                    expert=expert,
                )
                for i in numbers
                for expert in range(count)
                for at, name in enumerate(names)
            )
            shape = (*front, count, d_in, len(names) * outputs)
            return self.linear(LeafSpec(shape, parts, transposed=True), None)

        parts = tuple(
            Part(f"model.layers.{i}.{paths['router']}.weight", i if stacked else None) for i in numbers
        )
        router = LeafSpec((*front, self.config.hidden_size, count), parts, transposed=True)
        into = (kernel("gate", "up"),) if joined else (kernel("gate"), kernel("up"))
        return Experts(router, into, kernel("down"))

    def norms_of(self, layer: int) -> Norms:
        """The norms of one layer."""

        def norm(suffix: str, width: int) -> LeafSpec:
            return LeafSpec((width,), (Part(f"model.layers.{layer}.{suffix}.weight"),))

        return self.norms(norm)

    def norms(self, norm: Callable[[str, int], LeafSpec]) -> Norms:
        """The norms of a layer, or of all layers, each made by its path and its width."""
        config = self.config
        paths = POST_NORM_PATHS if config.post_norms else NORM_PATHS
        leaves = {name: norm(path, config.hidden_size) for name, path in paths.items()}
        if config.qk_norm:
            heads = {"query": config.num_heads, "key": config.num_kv_heads}
            for name, path in HEAD_NORM_PATHS.items():
                leaves[name] = norm(path, config.head_dim * (heads[name] if config.qk_norm_all_heads else 1))
        return Norms(**leaves)

    def part(
        self,
        number: int,
        name: str,
        kind: str,
        layer: int | None = None,
        columns: tuple[int, int] | None = None,
    ) -> Part:
        """The tensor of a module of a layer: a tensor of its own, or a part of a fused one.

        Args:
          number: number of the layer.
          layer, columns: fields of the part.
        """
        path, outputs = MODULE_PATHS[name], None
        if FAMILIES[self.config.family].fused and name in FUSED_PATHS:
            path = FUSED_PATHS[name]
            names = next(names for names in GROUPS if name in names)
            edges = (0, *accumulate(self.config.module_dims[mine][1] for mine in names))
            at = names.index(name)
            outputs = (edges[at], edges[at + 1], edges[-1])
        return Part(f"model.layers.{number}.{path}.{kind}", layer, columns, outputs)

    def linear(self, kernel: LeafSpec, bias: LeafSpec | None) -> Linear:
        """A module or a group of them, quantised if requested."""
        if self.quantize == "none":
            return Linear(kernel, bias)
        scheme, (*front, d_in, d_out) = SCHEMES[self.quantize], kernel.shape
        blocks = scheme.blocks(d_in, kernel.parts[0].name)
        codes = dataclasses.replace(kernel, encoded=Encoded(scheme, d_in, scales=False))
        scales = dataclasses.replace(
            kernel, shape=(*front, blocks, d_out), encoded=Encoded(scheme, d_in, scales=True)
        )
        return Linear(codes, bias, scales)
