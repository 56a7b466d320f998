"""A fine-tuning method, and an adapter of it.

The Transformer computes the frozen outputs of four projection groups (``types.GROUPS``) and calls a method to
adapt them; training, decoding, evaluation and storage each use a protocol of their own, see
``adapters.hooks``. None of them knows which method it has. A new method is one file with a subclass of
:class:`Method` and one line in ``adapters.registry``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import jax
from flax import struct

from milora_jax.adapters.hooks import DecodingHooks, ExportHooks, ParameterCounts, path_names
from milora_jax.adapters.inputs import Kernels, Shape
from milora_jax.errors import require
from milora_jax.prompt_format import PromptFormat
from milora_jax.shapes import Array, Key
from milora_jax.types import PyTree


@dataclass(frozen=True)
class Method(ParameterCounts, DecodingHooks, ExportHooks):
    """A fine-tuning method: hashable settings only, hence static under ``jax.jit``.

    :class:`ParameterCounts` inherits ``LayerHooks`` and ``TrainingHooks``, whose parameters it counts.

    The fields of a subclass are its settings, named as in ``config.AdapterSection``.
    """

    name: ClassVar[str] = ""
    """The method's name in ``adapter.method``."""

    all_modules: ClassVar[str] = "which has places of its own"
    """Why it takes no ``adapter.target_modules``, for the error."""


@dataclass(frozen=True)
class WidthMethod(Method):
    """Settings of methods whose size is one width.

    Attributes:
      width: W, of a bottleneck or of a short vector that is projected.
    """

    width: int = 1

    def __post_init__(self) -> None:
        require(self.width >= 1, "adapter.width", self.width, "at least 1")


@struct.dataclass
class Adapter:
    """A method's parameters together with everything needed to use them.

    Attributes:
      params: the trainable leaves: stacked on a layer axis, or a settled tuple of layers for decoding.
      method: the method that reads them.
      shape: the base they fit.
      prompt_format: how the prompts were written that it was trained on; no computation depends on it.
        :attr:`encoding` adds what of them the method reads.
    """

    params: PyTree
    method: Method = struct.field(pytree_node=False)
    shape: Shape = struct.field(pytree_node=False)
    prompt_format: PromptFormat = struct.field(pytree_node=False, default=PromptFormat())

    @property
    def encoding(self) -> PromptFormat:
        """How its prompts become tokens, and which of these its routers read."""
        return dataclasses.replace(self.prompt_format, route_on=self.method.route_scope)


def init_adapter(method: Method, key: Key[Array, ""], shape: Shape, kernels: Kernels) -> Adapter:
    """Make a fresh adapter for the base with these kernels, see ``base.modules.frozen_kernels``."""
    return Adapter(params=method.init(key, shape, kernels), method=method, shape=shape)


def router_mask(method: Method, params: PyTree) -> PyTree:
    """A tree like ``params`` that is True on the leaves of routers."""
    return jax.tree_util.tree_map_with_path(lambda path, _: method.role(path_names(path)).router, params)


def output_mask(method: Method, params: PyTree) -> PyTree:
    """A tree like ``params`` that is True on the B matrices of low-rank pairs."""
    return jax.tree_util.tree_map_with_path(lambda path, _: method.role(path_names(path)).output, params)
