"""BitFit: only biases are tuned (Ben Zaken et al. 2022, arXiv 2106.10199).

LLaMA has no biases, so the MiLoRA paper (Appendix D) adds one to each of the seven modules and makes
it from a shorter vector by a projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from milora_jax.adapters.inputs import ProjectionGroup
from milora_jax.adapters.projected import Projected, ProjectedMethod
from milora_jax.shapes import Array, Float
from milora_jax.types import EXPERTS


@dataclass(frozen=True)
class BitFit(ProjectedMethod):
    """BitFit: biases ``z P``, zero at the start."""

    name: ClassVar[str] = "bitfit"
    additive: ClassVar[bool] = True
    modules: ClassVar[tuple[str, ...]] = EXPERTS
    width: int = 64

    def adapt(
        self, params: dict[str, Projected], group: ProjectionGroup
    ) -> tuple[Float[Array, "B T _"], ...]:
        """Add each module's bias to its output."""
        return tuple(
            output + params[name].product()[None, None].astype(output.dtype)
            for name, output in zip(group.names, group.outputs, strict=True)
        )
