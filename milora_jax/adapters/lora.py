"""LoRA on all seven modules (Hu et al. 2021, arXiv 2106.09685): every pair always in force."""

from __future__ import annotations

from dataclasses import dataclass

from milora_jax.adapters.low_rank import LowRank, add_low_rank, init_pairs
from milora_jax.adapters.protocol import Method, Shape
from milora_jax.shapes import Array, Float, Key


@dataclass(frozen=True)
class LoRA(Method):
    """Settings of LoRA.

    Attributes:
      rank: width R of a pair.
      scale: factor of ``x A B``; 1 as in Eq. 1 of the MiLoRA paper, alpha / rank elsewhere.
      dropout: share of the pairs' input dropped while training.
    """

    rank: int
    scale: float
    dropout: float

    def init(self, key: Key[Array, ""], shape: Shape) -> dict[str, LowRank]:
        """One pair per module and layer."""
        return init_pairs(key, shape, self.rank)

    def adapt(
        self,
        params: dict[str, LowRank],
        names: tuple[str, ...],
        x: Float[Array, "B T d_in"],
        outputs: tuple[Float[Array, "B T _"], ...],
        weights: Float[Array, "B _ E"] | None,
        key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "B T _"], ...]:
        """Add every module's low-rank product (Eq. 1)."""
        return add_low_rank(params, names, x, outputs, weights, self.scale, self.dropout, key)

    def expert_sizes(self, shape: Shape) -> dict[str, int]:
        """``L * R * (d_in + d_out)`` per module."""
        return {name: shape.num_layers * self.rank * sum(dims) for name, dims in shape.modules}
