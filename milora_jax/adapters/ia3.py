"""(IA)3: outputs are rescaled by learned vectors (Liu et al. 2022, arXiv 2205.05638).

The setting is that of the MiLoRA paper (Appendix D): Query, Key and Up, each vector projected from a shorter
one. The original rescales keys, values and the input of Down, which is Up's output after the gate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from milora_jax.adapters.inputs import ProjectionGroup
from milora_jax.adapters.projected import Projected, ProjectedMethod
from milora_jax.adapters.records import Rescaled, WeightChange
from milora_jax.shapes import Array, Float
from milora_jax.types import unstack_layers


@dataclass(frozen=True)
class IA3(ProjectedMethod):
    """(IA)3 with vectors ``1 + z P``, which are ones at the start."""

    name: ClassVar[str] = "ia3"
    modules: ClassVar[tuple[str, ...]] = ("q", "k", "up")
    record: ClassVar[type | None] = Rescaled
    width: int = 128

    def weight_change(self, params: dict[str, Projected]) -> WeightChange:
        """The factors of the outputs of Query, Key and Up."""
        return WeightChange(
            {
                name: Rescaled(jnp.stack([1.0 + leaf.product() for leaf in unstack_layers(params[name])]))
                for name in self.modules
            }
        )

    def adapt(
        self, params: dict[str, Projected], group: ProjectionGroup
    ) -> tuple[Float[Array, "B T _"], ...]:
        """Multiply the outputs of Query, Key and Up by ``1 + z P``."""
        return tuple(
            output * (1.0 + params[name].product())[None, None].astype(output.dtype)
            if name in self.modules
            else output
            for name, output in zip(group.names, group.outputs, strict=True)
        )
