"""(IA)3: outputs rescaled by learned vectors (Liu et al. 2022, arXiv 2205.05638).

As the MiLoRA paper sets it (Appendix D): on Query, Key and Up, each vector a projection of a shorter
one. The original rescales keys, values and the input of Down, which is Up's output after the gate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from milora_jax.adapters.projected import Projected, init_projected
from milora_jax.adapters.protocol import Frozen, Kernels, Method, Shape
from milora_jax.config import require
from milora_jax.shapes import Array, Float, Key

SCALED = ("q", "k", "up")
"""The modules whose outputs are rescaled."""


@dataclass(frozen=True)
class IA3(Method):
    """(IA)3.

    Attributes:
      width: length of the short vectors.
    """

    name: ClassVar[str] = "ia3"
    width: int = 128

    def __post_init__(self) -> None:
        require(self.width >= 1, "adapter.width", self.width, "at least 1")

    def init(self, key: Key[Array, ""], shape: Shape, kernels: Kernels) -> dict[str, Projected]:
        """Vectors of ones, as ``1 + z P`` with P zero."""
        del kernels
        return init_projected(key, shape, SCALED, self.width)

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
        """Multiply the outputs of Query, Key and Up by ``1 + z P``."""
        del x, frozen, weights, key
        return tuple(
            output * (1.0 + params[name].product())[None, None].astype(output.dtype)
            if name in SCALED
            else output
            for name, output in zip(names, outputs, strict=True)
        )
