"""LoRA (Hu et al. 2021, arXiv 2106.09685): every pair is always active.

:class:`TunedPairs` is what LoRA shares with methods that are tuned otherwise and become LoRA.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp

from milora_jax.adapters.inputs import FrozenLayer, Kernels, ProjectionGroup, Shape
from milora_jax.adapters.joined import Joined, filled, join
from milora_jax.adapters.low_rank import LowRankMethod, Pair, add, drop, init_pairs, narrow, widen
from milora_jax.adapters.protocol import Method
from milora_jax.adapters.records import LowRank, WeightChange
from milora_jax.adapters.targets import TargetedMethod, adapt_part
from milora_jax.shapes import Array, Float, Key
from milora_jax.types import PyTree, stack_layers, unstack_layers


@dataclass(frozen=True)
class TunedPairs(LowRankMethod):
    """A method whose trained adapter is one pair per module and nothing else: it is decoded as LoRA."""

    record: ClassVar[type | None] = LowRank
    additive: ClassVar[bool] = True

    def folded(self, params: PyTree) -> Mapping[str, Pair]:
        """One layer's pairs, with all factors but the scale multiplied into them."""
        raise NotImplementedError(f"{type(self).__name__}.folded")

    def changes(self, params: PyTree, group: ProjectionGroup) -> tuple[Float[Array, "B T _"], ...]:
        """The terms added to a group's outputs in training."""
        raise NotImplementedError(f"{type(self).__name__}.changes")

    def prepare(self, params: PyTree, frozen: FrozenLayer, dtype: jnp.dtype) -> Joined:
        """The pairs, joined."""
        return join(filled(self.folded(params), frozen), self.scale, dtype)

    @property
    def is_pairs(self) -> bool:
        """True: a prepared adapter is joined pairs."""
        return True

    def pairs_of(self, params: Joined, group: ProjectionGroup) -> tuple[Any, None]:
        """The group's pairs, without factors."""
        return params.of(group.names), None

    def weight_change(self, params: PyTree) -> WeightChange:
        """The folded pairs of all layers."""
        folded = stack_layers(tuple(map(self.folded, unstack_layers(self.settle(params)))))
        return WeightChange(folded, self.scale, self.dropout, self.use_rslora)

    def served(self) -> Method:
        """The method without settings: the prepared pairs hold rank and scale, and dropout is off."""
        return LoRA()

    def adapt(self, params: PyTree, group: ProjectionGroup) -> tuple[Float[Array, "B T _"], ...]:
        """Add every module's low-rank product (Eq. 1)."""
        if isinstance(params, Joined):
            return add(group.outputs, params.changes(group.names, group.x))
        return add(group.outputs, self.changes(params, group))


@dataclass(frozen=True)
class LoRA(TargetedMethod, TunedPairs):
    """LoRA; it has the settings of every low-rank method, and a choice of modules."""

    name: ClassVar[str] = "lora"
    portable: ClassVar[bool] = True

    def init(self, key: Key[Array, ""], shape: Shape, kernels: Kernels) -> dict[str, LowRank]:
        """Make one pair per chosen module and layer."""
        del kernels
        return init_pairs(key, shape, self.rank, self.modules)

    def folded(self, params: dict[str, LowRank]) -> dict[str, LowRank]:
        """The pairs themselves."""
        return params

    def adapt(self, params: PyTree, group: ProjectionGroup) -> tuple[Float[Array, "B T _"], ...]:
        """Add the low-rank product of every chosen module (Eq. 1)."""
        if isinstance(params, Joined):
            return super().adapt(params, group)
        return adapt_part(group, self.modules, functools.partial(super().adapt, params))

    def changes(
        self, params: dict[str, LowRank], group: ProjectionGroup
    ) -> tuple[Float[Array, "B T _"], ...]:
        """Every module's low-rank product (Eq. 1)."""
        u = narrow(params, group.names, drop(group.x, self.dropout, group.key)) * self.scale
        return widen(params, group.names, u)
