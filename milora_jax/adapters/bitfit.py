"""BitFit: biases alone are tuned (Ben Zaken et al. 2022, arXiv 2106.10199).

LLaMA has no biases, so the MiLoRA paper (Appendix D) adds one to each of the seven modules and makes
it from a shorter vector by a projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from milora_jax.adapters.projected import Projected, init_projected
from milora_jax.adapters.protocol import Frozen, Kernels, Method, Shape
from milora_jax.config import require
from milora_jax.shapes import Array, Float, Key
from milora_jax.types import EXPERTS


@dataclass(frozen=True)
class BitFit(Method):
    """BitFit.

    Attributes:
      width: length of the short vectors.
    """

    name: ClassVar[str] = "bitfit"
    width: int = 64

    def __post_init__(self) -> None:
        require(self.width >= 1, "adapter.width", self.width, "at least 1")

    def init(self, key: Key[Array, ""], shape: Shape, kernels: Kernels) -> dict[str, Projected]:
        """Biases of zero, as ``z P`` with P zero."""
        del kernels
        return init_projected(key, shape, EXPERTS, self.width)

    def adapt(
        self,
        params: dict[str, Projected],
        names: tuple[str, ...],
        x: Float[Array, "B T d_in"],
        outputs: tuple[Float[Array, "B T _"], ...],
        frozen: tuple[Frozen, ...],
        weights: Float[Array, "B _ E"] | None,
        key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "B T _"], ...]:
        """Add its bias to every module's output."""
        del x, frozen, weights, key
        return tuple(
            output + params[name].product()[None, None].astype(output.dtype)
            for name, output in zip(names, outputs, strict=True)
        )
