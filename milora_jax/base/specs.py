"""Which tensors of a Hugging Face directory fill which leaves of a base: one table of names and shapes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import jax.numpy as jnp
import numpy as np

from milora_jax.base.modules import Base, JoinedLayer, Layer, Linear
from milora_jax.base.quantized import SCHEMES, Scheme
from milora_jax.config import ModelConfig
from milora_jax.types import EXPERTS, GROUPS

MODULE_PATHS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""Where Hugging Face keeps each of the seven modules inside a layer."""

ATTENTION = ("q", "k", "v", "o")
NORM_PATHS = ("input_layernorm.weight", "post_attention_layernorm.weight")


@dataclass(frozen=True)
class Part:
    """One tensor of the files, and where it lies in a leaf.

    Attributes:
      name: in the files.
      layer: its place on the leading axis of a stacked leaf.
      columns: its first column in a joined leaf, and the one after its last.
    """

    name: str
    layer: int | None = None
    columns: tuple[int, int] | None = None

    def within(self, box: tuple[slice, ...]) -> tuple[tuple[Any, ...], tuple[slice, ...]] | None:
        """What a box of the leaf, one slice per axis, holds of this tensor.

        Returns:
          Where in the box, and which slices of the tensor as the leaf orders its axes; None where they
          have nothing in common.
        """
        if self.layer is not None:
            layers, *rest = box
            inside = layers.start <= self.layer < layers.stop
            return ((self.layer - layers.start,), tuple(rest)) if inside else None
        if self.columns is None:
            return (), box
        *front, asked = box
        first, end = max(asked.start, self.columns[0]), min(asked.stop, self.columns[1])
        if first >= end:
            return None
        mine = slice(first - self.columns[0], end - self.columns[0])
        return (..., slice(first - asked.start, end - asked.start)), (*front, mine)


@dataclass(frozen=True)
class Encoded:
    """What a leaf holds of a quantised kernel.

    Attributes:
      scheme: by which it is encoded.
      d_in: rows of the kernel.
      scales: whether the leaf holds the scales, or the codes.
    """

    scheme: Scheme
    d_in: int
    scales: bool

    @property
    def dtype(self) -> str:
        """Of the leaf."""
        return self.scheme.scales_dtype if self.scales else self.scheme.codes_dtype


@dataclass(frozen=True)
class LeafSpec:
    """One leaf of the base and the tensors that fill it.

    Attributes:
      shape: of the leaf.
      parts: the tensors: one per layer for a stacked leaf, one per module for a joined one.
      transposed: whether the files hold it ``[out, in]``.
      encoded: what is made of the tensors' values; None where they are the leaf's.
    """

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    transposed: bool = False
    encoded: Encoded | None = None

    def dtype(self, plain: str) -> np.dtype:
        """Of the leaf, in a base whose plain leaves have the dtype ``plain``."""
        return jnp.dtype(plain if self.encoded is None else self.encoded.dtype)

    def rows_read(self, box: tuple[slice, ...]) -> tuple[slice, ...]:
        """A box of the leaf, as a box of what must be read for it: of a quantised kernel all rows."""
        return box if self.encoded is None else (*box[:-2], slice(0, self.encoded.d_in), box[-1])

    def part_shape(self, part: Part) -> tuple[int, ...]:
        """Shape of one of the tensors, as the leaf orders its axes."""
        shape = self.shape if self.encoded is None else (*self.shape[:-2], self.encoded.d_in, self.shape[-1])
        if part.layer is not None:
            return shape[1:]
        if part.columns is not None:
            return (*shape[:-1], part.columns[1] - part.columns[0])
        return shape


def base_specs(config: ModelConfig, decode: bool = False, quantize: str = "none") -> Base:
    """A Base whose leaves are LeafSpecs: the one table of names and shapes.

    Args:
      decode: a tuple of joined layers, as ``modules.decode_layout`` makes it, instead of a stacked one.
      quantize: how the kernels of the layers are kept, one of ``config.QUANTIZE``.

    Raises:
      UserError: for a kernel whose width does not suit the quantisation.
    """
    count = config.num_layers

    def linear(kernel: LeafSpec, bias: LeafSpec | None) -> Linear:
        if quantize == "none":
            return Linear(kernel, bias)
        scheme, (*front, d_in, d_out) = SCHEMES[quantize], kernel.shape
        blocks = scheme.blocks(d_in, kernel.parts[0].name)
        codes = dataclasses.replace(kernel, encoded=Encoded(scheme, d_in, scales=False))
        scales = dataclasses.replace(
            kernel, shape=(*front, blocks, d_out), encoded=Encoded(scheme, d_in, scales=True)
        )
        return Linear(codes, bias, scales)

    def plain(name: str, *shape: int, transposed: bool = False) -> LeafSpec:
        return LeafSpec(shape, (Part(name),), transposed)

    def stacked(suffix: str, *shape: int, transposed: bool = False) -> LeafSpec:
        parts = tuple(Part(f"model.layers.{i}.{suffix}", layer=i) for i in range(count))
        return LeafSpec((count, *shape), parts, transposed)

    def biased(name: str) -> bool:
        return config.attention_bias if name in ATTENTION else config.mlp_bias

    def stacked_layer() -> Layer:
        modules = {}
        for name in EXPERTS:
            path, (d_in, d_out) = MODULE_PATHS[name], config.module_dims[name]
            bias = stacked(f"{path}.bias", d_out) if biased(name) else None
            modules[name] = linear(stacked(f"{path}.weight", d_in, d_out, transposed=True), bias)
        attention_norm, feedforward_norm = (stacked(name, config.hidden_size) for name in NORM_PATHS)
        return Layer(attention_norm, feedforward_norm, modules)

    def joined_layer(prefix: str) -> JoinedLayer:
        groups, widths = [], []
        for names in GROUPS:
            d_in = config.module_dims[names[0]][0]
            outputs = tuple(config.module_dims[name][1] for name in names)
            edges = (0, *accumulate(outputs))

            def joined(
                kind: str,
                *front: int,
                transposed: bool = False,
                names: tuple[str, ...] = names,
                edges: tuple[int, ...] = edges,
            ) -> LeafSpec:
                parts = tuple(
                    Part(f"{prefix}.{MODULE_PATHS[name]}.{kind}", columns=ends)
                    for name, ends in zip(names, pairwise(edges), strict=True)
                )
                return LeafSpec((*front, edges[-1]), parts, transposed)

            bias = joined("bias") if biased(names[0]) else None
            groups.append(linear(joined("weight", d_in, transposed=True), bias))
            widths.append(outputs)
        attention_norm, feedforward_norm = (
            plain(f"{prefix}.{name}", config.hidden_size) for name in NORM_PATHS
        )
        return JoinedLayer(attention_norm, feedforward_norm, tuple(groups), tuple(widths))

    layers = tuple(joined_layer(f"model.layers.{i}") for i in range(count)) if decode else stacked_layer()
    vocab, width = config.vocab_size, config.hidden_size
    head = None if config.tie_embeddings else plain("lm_head.weight", width, vocab, transposed=True)
    return Base(
        plain("model.embed_tokens.weight", vocab, width), layers, plain("model.norm.weight", width), head
    )
