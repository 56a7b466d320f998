"""The inputs of a method's hooks: the shape of the base, its frozen leaves, and what enters a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from milora_jax.shapes import Array, Bool, Float, Int, Key
from milora_jax.types import EXPERTS

SUBLAYERS = ("attention", "feedforward")
"""The two residual branches of a layer, to each of which a method may add a branch of its own."""


@dataclass(frozen=True)
class Shape:
    """The part of a base's shape that decides an adapter's: widths of the seven modules and depth.

    Attributes:
      modules: ``(name, (input width, output width))`` in the order of ``types.EXPERTS``.
      num_layers: L.
      hidden_size: D.
    """

    modules: tuple[tuple[str, tuple[int, int]], ...]
    num_layers: int
    hidden_size: int

    @classmethod
    def of(cls, module_dims: dict[str, tuple[int, int]], num_layers: int, hidden_size: int) -> Shape:
        """Build a shape from ``ModelConfig.module_dims``, in any order."""
        return cls(tuple((name, module_dims[name]) for name in EXPERTS), num_layers, hidden_size)

    @property
    def dims(self) -> dict[str, tuple[int, int]]:
        """Input and output width by module."""
        return dict(self.modules)


class Frozen(NamedTuple):
    """The leaves of one frozen linear module, for methods that read the weight they change."""

    kernel: Float[Array, "d_in d_out"]
    bias: Float[Array, " d_out"] | None


FrozenLayer = Callable[[int], tuple[Frozen, ...]]
"""The leaves of one layer's projection groups, by place in ``types.GROUPS``."""

Kernels = Mapping[str, Any]
"""The frozen kernels of all layers, ``[L, d_in, d_out]``, by module."""

Project = Callable[[Array], tuple[Array, Array]]
"""Maps hidden vectors ``[B P D]`` to the keys and values ``[B P K*H]`` of the frozen layer."""


class LayerInput(NamedTuple):
    """The input of a layer, which a method may read before the layer runs.

    Attributes:
      hidden: residual stream before the layer.
      normed: the residual stream after the layer's input norm, where the family has one there.
      members: whether each token belongs to the prompt of each record; a router reads no other tokens.
      depth: layer index over L, in [0, 1).
    """

    hidden: Float[Array, "B T D"]
    normed: Float[Array, "B T D"]
    members: Bool[Array, "B Z T"]
    depth: Float[Array, ""]


@dataclass(frozen=True)
class ProjectionGroup:
    """Modules that share an input, as one layer evaluates them.

    Attributes:
      names: names of the modules.
      x: the input that they share.
      outputs: outputs of the frozen modules for ``x``, bias included, one array per name.
      frozen: the modules' own leaves.
      weights: routing weights of the layer, per row (middle axis 1) or per token (T); None without a route.
      key: random key for dropout; None outside training or without dropout.
    """

    names: tuple[str, ...]
    x: Float[Array, "B T _"]
    outputs: tuple[Float[Array, "B T _"], ...]
    frozen: tuple[Frozen, ...]
    weights: Float[Array, "B _ E"] | None
    key: Key[Array, ""] | None


class RoutingSchedule(NamedTuple):
    """The routing settings that may change in the course of training, at one step.

    Attributes:
      top_k: number of experts; None, the method's own number, is compiled as a constant.
      load_balance: lambda, the weight of Eq. 4.
    """

    top_k: Int[Array, ""] | None
    load_balance: Float[Array, ""] | float


class ExpertUse(NamedTuple):
    """How the prompts of a training batch used the experts of each layer.

    Attributes:
      chosen: share of the prompts whose route holds the expert.
      first: share of the prompts for which the expert is the most probable one, ``f_i`` of Eq. 5.
      features: mean over the prompts of the standardized features, and of their squares; None without them.
    """

    chosen: Float[Array, "L E"]
    first: Float[Array, "L E"]
    features: Float[Array, "L 2 D"] | None = None
