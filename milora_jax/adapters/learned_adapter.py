"""Learned-Adapter: a Parallel-Adapter whose activations are learned rational functions, one per bottleneck.

We read no code of it. Ours takes the placement of the MiLoRA paper (Appendix D) and that paper's
rational function (Eq. 6), whose coefficients are trained like those of MiLoRA's router.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from milora_jax.adapters.bottleneck import Bottleneck, init_branches
from milora_jax.adapters.protocol import Kernels, Method, Shape
from milora_jax.adapters.rational import rational
from milora_jax.config import COEFFICIENTS, one_of, require
from milora_jax.shapes import Array, Float, Key


@dataclass(frozen=True)
class LearnedAdapter(Method):
    """Learned-Adapter.

    Attributes:
      width: of the bottleneck.
      coefficients: how the rational coefficients are trained.
    """

    name: ClassVar[str] = "learned_adapter"
    width: int = 160
    coefficients: str = "bilevel"

    def __post_init__(self) -> None:
        require(self.width >= 1, "adapter.width", self.width, "at least 1")
        one_of("adapter.coefficients", self.coefficients, COEFFICIENTS)

    @property
    def theta(self) -> str:
        """The rational coefficients are Theta."""
        return self.coefficients

    def is_coefficient(self, path: tuple[str, ...]) -> bool:
        """The rational coefficients are Theta."""
        return path[-1] in ("numerator", "denominator")

    def init(self, key: Key[Array, ""], shape: Shape, kernels: Kernels) -> dict[str, Bottleneck]:
        """Two bottlenecks per layer that add nothing yet, with activations near GELU."""
        del kernels
        return init_branches(key, shape, self.width, learned=True)

    def branch(
        self, params: dict[str, Bottleneck], sublayer: str, x: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """``Ra(x W_down) W_up``."""
        mine = params[sublayer]
        if mine.numerator is None or mine.denominator is None:
            raise ValueError("Learned-Adapter needs its coefficients")
        inner = rational(x @ mine.reduce.astype(x.dtype), mine.numerator, mine.denominator)
        return inner.astype(x.dtype) @ mine.expand.astype(x.dtype)
