"""LoRA on all seven modules (Hu et al. 2021, arXiv 2106.09685): every pair always in force."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from milora_jax.adapters.low_rank import LowRank, LowRankMethod, add, drop, init_pairs, narrow, widen
from milora_jax.adapters.protocol import Kernels, ProjectionGroup, Shape
from milora_jax.shapes import Array, Float, Key


@dataclass(frozen=True)
class LoRA(LowRankMethod):
    """LoRA; its settings are those of every low-rank method."""

    name: ClassVar[str] = "lora"

    def init(self, key: Key[Array, ""], shape: Shape, kernels: Kernels) -> dict[str, LowRank]:
        """One pair per module and layer."""
        del kernels
        return init_pairs(key, shape, self.rank)

    def adapt(self, params: dict[str, LowRank], group: ProjectionGroup) -> tuple[Float[Array, "B T _"], ...]:
        """Add every module's low-rank product (Eq. 1)."""
        u = narrow(params, group.names, drop(group.x, self.dropout, group.key)) * self.scale
        return add(group.outputs, widen(params, group.names, u))
