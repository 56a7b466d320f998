"""MiLoRA: seven low-rank experts per layer and a router that looks at the prompt once (section 3)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from milora_jax.adapters.joined import Joined, join
from milora_jax.adapters.low_rank import (
    LowRankMethod,
    add,
    drop,
    init_pairs,
    narrow,
    of_group,
    pair_sizes,
    widen,
)
from milora_jax.adapters.protocol import FrozenLayer, Kernels, Method, ProjectionGroup, Shape
from milora_jax.adapters.router import Router, RouterParams
from milora_jax.config import ACTIVATIONS, COEFFICIENTS, GATES, POOLERS
from milora_jax.errors import one_of, require
from milora_jax.shapes import Array, Bool, Float, Key
from milora_jax.types import EXPERTS, Route


@struct.dataclass
class MiLoRAParams:
    """The trainable tree of MiLoRA and MiDoRA.

    Attributes:
      experts: one expert per module, by the names of ``types.EXPERTS``; joined for decoding.
      router: one router per layer.
    """

    experts: Any
    router: RouterParams


@dataclass(frozen=True)
class MiLoRA(LowRankMethod):
    """MiLoRA; see ``docs/method.md`` for each choice.

    Attributes:
      top_k: experts a prompt activates per layer, k of 7.
      pooler: how a prompt's hidden states become one vector (section 3.3 of the paper).
      activation: the router's activation; ``relu-gelu`` is ReLU in the first half of the layers.
      normalize: RMS-normalise the pooled vector before the activation.
      gate: how a route weighs its chosen experts.
      load_balance: lambda, the weight of Eq. 4.
      coefficients: how the rational coefficients are trained (Appendix A).
    """

    name: ClassVar[str] = "milora"
    routes: ClassVar[bool] = True
    top_k: int = 3
    pooler: str = "attention"
    activation: str = "rational"
    normalize: bool = True
    gate: str = "straight_through"
    load_balance: float = 1e-2
    coefficients: str = "bilevel"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("adapter.pooler", self.pooler, POOLERS)
        one_of("adapter.activation", self.activation, ACTIVATIONS)
        one_of("adapter.gate", self.gate, GATES)
        one_of("adapter.coefficients", self.coefficients, COEFFICIENTS)
        require(1 <= self.top_k <= 7, "adapter.top_k", self.top_k, "1 to 7, a layer has 7 experts")
        balance_fits = math.isfinite(self.load_balance) and self.load_balance >= 0
        require(balance_fits, "adapter.load_balance", self.load_balance, "0 or more")

    @property
    def router(self) -> Router:
        """The settings that decide a route."""
        return Router(self.top_k, self.pooler, self.activation, self.normalize, self.gate)

    @property
    def balance_weight(self) -> float:
        """lambda of Eq. 4."""
        return self.load_balance

    @property
    def theta(self) -> str:
        """The rational coefficients are Theta."""
        return self.coefficients

    def is_coefficient(self, path: tuple[str, ...]) -> bool:
        """The rational coefficients are Theta."""
        return path[-1] in ("numerator", "denominator")

    def is_router(self, path: tuple[str, ...]) -> bool:
        """Poolers, router matrices and their activations."""
        return path[0] == "router"

    def init_experts(self, key: Key[Array, ""], shape: Shape, kernels: Kernels) -> dict[str, Any]:
        """Experts that change nothing yet."""
        del kernels
        return init_pairs(key, shape, self.rank)

    def init(self, key: Key[Array, ""], shape: Shape, kernels: Kernels) -> MiLoRAParams:
        """Experts that change nothing yet, and routers that choose almost at random."""
        experts_key, router_key = jax.random.split(key)
        return MiLoRAParams(
            experts=self.init_experts(experts_key, shape, kernels),
            router=self.router.init(router_key, shape.num_layers, shape.hidden_size),
        )

    def prepare(self, params: MiLoRAParams, frozen: FrozenLayer, dtype: jnp.dtype) -> MiLoRAParams:
        """The experts, joined; the router as it is."""
        del frozen
        return dataclasses.replace(params, experts=join(params.experts, self.scale, dtype))

    @property
    def is_pairs(self) -> bool:
        """The chosen experts are joined pairs."""
        return True

    def pairs_of(self, params: MiLoRAParams, group: ProjectionGroup) -> tuple[Any, Float[Array, "B _ M 1"]]:
        """The group's experts, each times its routing weight."""
        return params.experts.of(group.names), of_group(routed(group.weights), group.names)

    def served(self) -> Method:
        """The router's settings remain."""
        plain = type(self)()
        return dataclasses.replace(
            self,
            rank=plain.rank,
            alpha=plain.alpha,
            dropout=plain.dropout,
            load_balance=plain.load_balance,
            coefficients=plain.coefficients,
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

    def adapt(self, params: MiLoRAParams, group: ProjectionGroup) -> tuple[Float[Array, "B T _"], ...]:
        """Add the chosen experts' products, each times its routing weight (Eq. 1 and 3).

        Scale and weight multiply the R-wide product, not the wide output.
        """
        weights = of_group(routed(group.weights), group.names)
        if isinstance(params.experts, Joined):
            return add(group.outputs, params.experts.changes(group.names, group.x, weights))
        u = narrow(params.experts, group.names, drop(group.x, self.dropout, group.key)) * self.scale
        u = u * weights.astype(u.dtype)
        return add(group.outputs, widen(params.experts, group.names, u))

    def expert_sizes(self, shape: Shape) -> dict[str, int]:
        """Parameters of each expert over all layers: those in force where the expert is chosen."""
        return pair_sizes(shape, self.rank)

    def active_parameters(self, shape: Shape, share: Mapping[str, float], tunable: int) -> float:
        """The chosen experts' parameters; the router runs once per prompt and is not counted."""
        del tunable
        sizes = self.expert_sizes(shape)
        return sum(sizes[name] * share[name] for name in EXPERTS)


def routed(weights: Float[Array, "B _ E"] | None) -> Float[Array, "B _ E"]:
    """The routing weights, which a routed method cannot do without."""
    if weights is None:
        raise ValueError("a routed method needs a route: give forward a prompt mask or route weights")
    return weights
