"""MiDoRA: MiLoRA's routing with DoRA experts.

The paper names it in Table 1 but does not define it. Here a chosen expert gives its module the weight
``m * (W + s A B) / n`` of ``adapters.dora``, and a module that is not chosen keeps W.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from milora_jax.adapters.dora import decomposed_changes, init_decomposed, join_decomposed
from milora_jax.adapters.inputs import FrozenLayer, Kernels, ProjectionGroup, Shape
from milora_jax.adapters.low_rank import add, of_group
from milora_jax.adapters.milora import MiLoRA, MiLoRAParams, routed
from milora_jax.adapters.records import Decomposed
from milora_jax.shapes import Array, Float, Key


@dataclass(frozen=True)
class MiDoRA(MiLoRA):
    """MiDoRA; it has MiLoRA's settings."""

    name: ClassVar[str] = "midora"
    additive: ClassVar[bool] = False
    record: ClassVar[type | None] = Decomposed

    def init_experts(self, key: Key[Array, ""], shape: Shape, kernels: Kernels) -> dict[str, Decomposed]:
        """Make experts that change nothing but by rounding."""
        return init_decomposed(key, shape, self.rank, kernels)

    @property
    def is_pairs(self) -> bool:
        """False: a chosen expert also scales its module's own output."""
        return False

    def prepare(self, params: MiLoRAParams, frozen: FrozenLayer, dtype: jnp.dtype) -> MiLoRAParams:
        """Join the experts and compute their norms; the router stays as it is."""
        experts = join_decomposed(params.experts, frozen, self.scale, dtype)
        return dataclasses.replace(params, experts=experts)

    def adapt(self, params: MiLoRAParams, group: ProjectionGroup) -> tuple[Float[Array, "B T _"], ...]:
        """Add the chosen experts' changes, each multiplied by its routing weight."""
        changes = decomposed_changes(params.experts, group, self.scale, self.dropout)
        chosen = of_group(routed(group.weights), group.names)
        weighed = tuple(change * chosen[..., i, :].astype(change.dtype) for i, change in enumerate(changes))
        return add(group.outputs, weighed)

    def expert_sizes(self, shape: Shape) -> dict[str, int]:
        """Number of parameters of each expert over all layers, its pair and its magnitudes."""
        pairs = super().expert_sizes(shape)
        return {name: pairs[name] + shape.num_layers * d_out for name, (_, d_out) in shape.modules}
