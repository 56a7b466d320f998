"""MiLoRA: seven low-rank experts per layer and a router that looks at the prompt once (section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
from flax import struct

from milora_jax.adapters.low_rank import LowRank, add_low_rank, init_pairs
from milora_jax.adapters.protocol import Method, Shape
from milora_jax.adapters.router import Router, RouterParams
from milora_jax.shapes import Array, Bool, Float, Key
from milora_jax.types import Route


@struct.dataclass
class MiLoRAParams:
    """The trainable tree of MiLoRA.

    Attributes:
      experts: one pair per module, by the names of ``types.EXPERTS``.
      router: one router per layer.
    """

    experts: dict[str, LowRank]
    router: RouterParams


@dataclass(frozen=True)
class MiLoRA(Method):
    """Settings of MiLoRA.

    Attributes:
      rank: width R of every expert.
      scale: factor of ``x A B``; Eq. 1 has none, so 1.
      dropout: share of the experts' input dropped while training.
      router: how a prompt becomes a route.
    """

    rank: int
    scale: float
    dropout: float
    router: Router
    routes: ClassVar[bool] = True

    def init(self, key: Key[Array, ""], shape: Shape) -> MiLoRAParams:
        """Experts that change nothing yet, and routers that choose almost at random."""
        experts_key, router_key = jax.random.split(key)
        return MiLoRAParams(
            experts=init_pairs(experts_key, shape, self.rank),
            router=self.router.init(router_key, shape.num_layers, shape.hidden_size),
        )

    def route(
        self,
        params: MiLoRAParams,
        hidden: Float[Array, "B T D"],
        members: Bool[Array, "B Z T"],
        depth: Float[Array, ""],
    ) -> Route:
        """Eq. 2 and 3 for this layer."""
        return self.router(params.router, hidden, members, depth)

    def adapt(
        self,
        params: MiLoRAParams,
        names: tuple[str, ...],
        x: Float[Array, "B T d_in"],
        outputs: tuple[Float[Array, "B T _"], ...],
        weights: Float[Array, "B _ E"] | None,
        key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "B T _"], ...]:
        """Add the chosen experts' products, each times its routing weight (Eq. 1 and 3)."""
        if weights is None:
            raise ValueError("MiLoRA needs a route: give forward a prompt mask or route weights")
        return add_low_rank(params.experts, names, x, outputs, weights, self.scale, self.dropout, key)

    def is_coefficient(self, path: tuple[str, ...]) -> bool:
        """The rational coefficients are Theta."""
        return path[-1] in ("numerator", "denominator")

    def expert_sizes(self, shape: Shape) -> dict[str, int]:
        """``L * R * (d_in + d_out)`` per expert."""
        return {name: shape.num_layers * self.rank * sum(dims) for name, dims in shape.modules}
