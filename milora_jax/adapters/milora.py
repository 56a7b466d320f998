"""MiLoRA: seven low-rank experts per layer and a router that reads the prompt once (section 3)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from milora_jax.adapters.hooks import Calibration, LeafRole
from milora_jax.adapters.inputs import (
    ExpertUse,
    FrozenLayer,
    Kernels,
    LayerInput,
    ProjectionGroup,
    RoutingSchedule,
    Shape,
)
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
from milora_jax.adapters.protocol import Method
from milora_jax.adapters.records import LowRank, Parts, WeightChange
from milora_jax.adapters.router import Router, RouterParams, followed
from milora_jax.config import ACTIVATIONS, BALANCES, COEFFICIENTS, FEATURES, GATES, POOLERS, ROUTER_GRADIENTS
from milora_jax.errors import one_of, require
from milora_jax.prompt_format import ROUTE_ON
from milora_jax.shapes import Array, Bool, Float, Int, Key
from milora_jax.types import EXPERTS, PyTree, Route

LEAST_WINDOW = 10.0
"""Fewest steps over which statistics of features are averaged: those of a batch or two are noise."""

OF_TRAINING = (
    "feature_window",
    "router_gradient",
    "top_k_anneal",
    "load_balance",
    "balance_warmup",
    "balance_until",
    "balance_decay",
    "bias_rate",
    "coefficients",
)
"""Settings that no computation of a trained adapter depends on."""

OF_BATCHES = ("route_on",)
"""Settings that say which tokens of a prompt ``types.Batch.prompt_mask`` holds, and act on nothing else."""


@struct.dataclass
class MiLoRAParams:
    """The trainable tree of MiLoRA and MiDoRA.

    Attributes:
      experts: one expert per module, by the names of ``types.EXPERTS``; joined for decoding.
      router: one router per layer.
    """

    experts: Any
    router: RouterParams


@struct.dataclass
class PastChoices:
    """Decayed sums over past steps, for a running average of ``f_i`` (Eq. 5).

    Attributes:
      first: sum of the shares of prompts for which each expert was the most probable one.
      steps: sum of ones, that is the weight of the average.
    """

    first: Float[Array, "L E"]
    steps: Float[Array, ""]


@dataclass(frozen=True)
class MiLoRA(LowRankMethod):
    """MiLoRA and its settings; ``docs/method.md`` explains each choice.

    Attributes:
      route_on: the part of the prompt that the router reads: prompt, all of it; first_turn, the system
        messages and the first user message of a chat; system, its system messages alone.
      top_k: experts a prompt activates per layer, k of 7.
      pooler: how a prompt's hidden states become one vector (section 3.3 of the paper).
      activation: the router's activation; ``relu-gelu`` is ReLU in the first half of the layers.
      features: form of the pooled vector that the activation reads: raw, rms or standardized; see
        ``adapters.router``.
      feature_window: share of the steps over which running statistics of standardized features are averaged;
        0 keeps the statistics that were measured before the first step.
      gate: how a route weights its chosen experts.
      router_gradient: experts that give the router a gradient: chosen, those of the route; dense, all seven.
      top_k_anneal: share of the steps over which k falls from 7 to ``top_k``; 0 trains at ``top_k``.
      balance: what balances the experts: loss, Eq. 4; bias, a bias that affects only the choice, beside Eq. 4
        where ``load_balance`` is not 0.
      load_balance: lambda, the weight of Eq. 4.
      balance_warmup: share of the steps over which lambda rises from 0.
      balance_until: share of the steps after which balancing ends.
      balance_decay: decay of the running average of ``f_i`` over steps; 0 uses each batch alone.
      bias_rate: change of an expert's bias in a step, with ``balance`` bias.
      coefficients: how the rational coefficients are trained (Appendix A).
    """

    name: ClassVar[str] = "milora"
    additive: ClassVar[bool] = True
    routes: ClassVar[bool] = True
    record: ClassVar[type | None] = LowRank
    portable: ClassVar[bool] = True
    all_modules: ClassVar[str] = "whose routers choose among all seven modules of a layer"
    route_on: str = "prompt"
    top_k: int = 3
    pooler: str = "attention"
    activation: str = "rational"
    features: str = "standardized"
    feature_window: float = 0.1
    gate: str = "straight_through"
    router_gradient: str = "dense"
    top_k_anneal: float = 0.4
    balance: str = "loss"
    load_balance: float = 0.0
    balance_warmup: float = 0.0
    balance_until: float = 1.0
    balance_decay: float = 0.0
    bias_rate: float = 1e-3
    coefficients: str = "bilevel"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("adapter.route_on", self.route_on, ROUTE_ON)
        one_of("adapter.pooler", self.pooler, POOLERS)
        one_of("adapter.activation", self.activation, ACTIVATIONS)
        one_of("adapter.gate", self.gate, GATES)
        one_of("adapter.features", self.features, FEATURES)
        one_of("adapter.router_gradient", self.router_gradient, ROUTER_GRADIENTS)
        one_of("adapter.balance", self.balance, BALANCES)
        one_of("adapter.coefficients", self.coefficients, COEFFICIENTS)
        require(1 <= self.top_k <= 7, "adapter.top_k", self.top_k, "1 to 7, a layer has 7 experts")
        for name in ("load_balance", "bias_rate"):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, f"adapter.{name}", value, "0 or more")
        for name in ("top_k_anneal", "balance_warmup", "balance_decay"):
            require(0 <= getattr(self, name) < 1, f"adapter.{name}", getattr(self, name), "from 0 to below 1")
        require(0 <= self.feature_window <= 1, "adapter.feature_window", self.feature_window, "from 0 to 1")
        require(0 < self.balance_until <= 1, "adapter.balance_until", self.balance_until, "above 0, up to 1")
        order = self.balance_warmup < self.balance_until
        require(order, "adapter.balance_warmup", self.balance_warmup, "less than adapter.balance_until")

    @property
    def route_scope(self) -> str:
        """What the routers read."""
        return self.route_on

    @property
    def router(self) -> Router:
        """The router with the settings that decide a route."""
        return Router(
            top_k=self.top_k,
            pooler=self.pooler,
            activation=self.activation,
            features=self.features,
            gate=self.gate,
            dense=self.router_gradient == "dense",
            biased=self.balance == "bias",
        )

    @property
    def final_schedule(self) -> RoutingSchedule:
        """The settings after training: the method's own k and lambda."""
        return RoutingSchedule(None, self.load_balance)

    def schedule(self, step: Int[Array, ""], total_steps: int) -> RoutingSchedule:
        """k falls from 7 to ``top_k`` in equal parts; lambda is warmed up, and 0 after ``balance_until``."""
        top_k, load_balance = self.final_schedule
        if falling := self._steps(self.top_k_anneal, total_steps):
            fallen = (len(EXPERTS) - self.top_k) * step // falling
            top_k = jnp.maximum(len(EXPERTS) - fallen, self.top_k).astype(jnp.int32)
        if rising := self._steps(self.balance_warmup, total_steps):
            load_balance = load_balance * jnp.minimum((step + 1).astype(jnp.float32) / rising, 1.0)
        if self.balance_until < 1:
            load_balance = jnp.where(self._balances(step, total_steps), load_balance, 0.0)
        return RoutingSchedule(top_k, load_balance)

    def ready(self, step: int, total_steps: int) -> bool:
        """Whether the last update came after all schedules, with k at ``top_k``."""
        shares = (self.top_k_anneal, self.balance_warmup, self.balance_until % 1)
        return step > max(self._steps(share, total_steps) for share in shares)

    def _steps(self, share: float, total_steps: int) -> int:
        """A share of the steps, as a number of steps below the total."""
        return min(math.ceil(share * total_steps), total_steps - 1)

    def _balances(self, step: Int[Array, ""], total_steps: int) -> Bool[Array, ""]:
        """Whether the step is before ``balance_until``."""
        return step < (
            total_steps if self.balance_until == 1 else self._steps(self.balance_until, total_steps)
        )

    def init_memory(self, params: MiLoRAParams) -> PastChoices | None:
        """The state of the running average of ``f_i``; None without one."""
        if not self.balance_decay:
            return None
        layers = params.router.weight.shape[0]
        return PastChoices(jnp.zeros((layers, len(EXPERTS)), jnp.float32), jnp.zeros((), jnp.float32))

    def first_choices(self, memory: PastChoices | None, first: Float[Array, "L E"]) -> Float[Array, "L E"]:
        """``f_i`` averaged over the steps, with the latest steps weighing most."""
        if memory is None:
            return first
        decay = self.balance_decay
        return (decay * memory.first + first) / (decay * memory.steps + 1.0)

    def after_update(
        self,
        params: MiLoRAParams,
        grads: PyTree,
        memory: PastChoices | None,
        step: Int[Array, ""],
        total_steps: int,
        use: ExpertUse | None = None,
    ) -> tuple[MiLoRAParams, PastChoices | None]:
        """Remember the batch's first choices, move the biases towards equal use, and update the statistics of
        the features.

        An expert that was in more routes of the batch than its share loses ``bias_rate``, one that was in
        fewer gains it (Wang et al. 2024, arXiv 2408.15664, algorithm 1).
        """
        del grads
        if use is None:
            raise ValueError("a routed method needs to know how its experts were used")
        if memory is not None:
            decay = self.balance_decay
            memory = PastChoices(decay * memory.first + use.first, decay * memory.steps + 1.0)
        if params.router.bias is not None:
            equal = use.chosen.mean(axis=-1, keepdims=True)
            moved = params.router.bias + self.bias_rate * jnp.sign(equal - use.chosen)
            bias = jnp.where(self._balances(step - 1, total_steps), moved, params.router.bias)
            params = dataclasses.replace(params, router=dataclasses.replace(params.router, bias=bias))
        if use.features is not None and self.feature_window:
            window = max(self.feature_window * total_steps, LEAST_WINDOW)
            params = dataclasses.replace(params, router=followed(params.router, use.features, window))
        return params, memory

    @property
    def theta(self) -> str:
        """How the rational coefficients, which are Theta, are trained."""
        return self.coefficients

    def role(self, path: tuple[str, ...]) -> LeafRole:
        """The role of a leaf: coefficients are Theta; rules set biases and the statistics of features."""
        return LeafRole(
            trained=path[0] != "router" or path[-1] not in ("mean", "deviation", "bias"),
            router=path[0] == "router",
            coefficient=path[-1] in ("numerator", "denominator"),
            output=path[0] == "experts" and path[-1] == "b",
        )

    def init_experts(self, key: Key[Array, ""], shape: Shape, kernels: Kernels) -> dict[str, Any]:
        """Make experts that change nothing yet."""
        del kernels
        return init_pairs(key, shape, self.rank)

    def init(self, key: Key[Array, ""], shape: Shape, kernels: Kernels) -> MiLoRAParams:
        """Make experts that change nothing yet, and routers that choose almost at random."""
        experts_key, router_key = jax.random.split(key)
        return MiLoRAParams(
            experts=self.init_experts(experts_key, shape, kernels),
            router=self.router.init(router_key, shape.num_layers, shape.hidden_size),
        )

    def prepare(self, params: MiLoRAParams, frozen: FrozenLayer, dtype: jnp.dtype) -> MiLoRAParams:
        """Join the experts; the router stays as it is."""
        del frozen
        return dataclasses.replace(params, experts=join(params.experts, self.scale, dtype))

    @property
    def is_pairs(self) -> bool:
        """True: the chosen experts are joined pairs."""
        return True

    def pairs_of(self, params: MiLoRAParams, group: ProjectionGroup) -> tuple[Any, Float[Array, "B _ M 1"]]:
        """The group's experts, with their routing weights."""
        return params.experts.of(group.names), of_group(routed(group.weights), group.names)

    def served(self) -> Method:
        """The method with the settings of its router only."""
        plain = type(self)()
        return dataclasses.replace(
            self,
            rank=plain.rank,
            alpha=plain.alpha,
            use_rslora=plain.use_rslora,
            dropout=plain.dropout,
            **{name: getattr(plain, name) for name in (*OF_TRAINING, *OF_BATCHES)},
        )

    def route(self, params: MiLoRAParams, entering: LayerInput, top_k: Int[Array, ""] | None = None) -> Route:
        """Compute this layer's route (Eq. 2 and 3)."""
        return self.router(params.router, entering, top_k)

    @property
    def calibration(self) -> Calibration | None:
        """How standardized features are measured; None with other features."""
        if not self.router.standardizes:
            return None

        def features(entering: LayerInput) -> Float[Array, "B Z D"]:
            width = entering.hidden.shape[-1]
            weight = jnp.zeros(width, jnp.float32) if self.pooler == "attention" else None
            return self.router.pooled(entering, weight)[0]

        def store(
            params: MiLoRAParams, mean: Float[Array, "L D"], deviation: Float[Array, "L D"]
        ) -> MiLoRAParams:
            router = dataclasses.replace(params.router, mean=mean, deviation=deviation)
            return dataclasses.replace(params, router=router)

        return Calibration(features, store)

    def weight_change(self, params: MiLoRAParams) -> WeightChange:
        """The change of each expert, where it is chosen."""
        return WeightChange(params.experts, self.scale, self.dropout, self.use_rslora)

    def parts(self, params: MiLoRAParams) -> Parts:
        """The experts and the router."""
        return Parts(params.experts, params.router)

    def from_parts(self, parts: Parts) -> MiLoRAParams:
        """Make the parameters from experts and router."""
        return MiLoRAParams(dict(parts.records), parts.router)

    def adapt(self, params: MiLoRAParams, group: ProjectionGroup) -> tuple[Float[Array, "B T _"], ...]:
        """Add the chosen experts' products, each multiplied by its routing weight (Eq. 1 and 3).

        Scale and weight multiply the R-wide product instead of the wide output.
        """
        weights = of_group(routed(group.weights), group.names)
        if isinstance(params.experts, Joined):
            return add(group.outputs, params.experts.changes(group.names, group.x, weights))
        u = narrow(params.experts, group.names, drop(group.x, self.dropout, group.key)) * self.scale
        u = u * weights.astype(u.dtype)
        return add(group.outputs, widen(params.experts, group.names, u))

    def expert_sizes(self, shape: Shape) -> dict[str, int]:
        """Number of parameters of each expert over all layers, which are used where it is chosen."""
        return pair_sizes(shape, self.rank)

    def active_parameters(self, shape: Shape, share: Mapping[str, float], tunable: int) -> float:
        """Parameters of the chosen experts; the router runs once per prompt and is not counted."""
        del tunable
        sizes = self.expert_sizes(shape)
        return sum(sizes[name] * share[name] for name in EXPERTS)


def routed(weights: Float[Array, "B _ E"] | None) -> Float[Array, "B _ E"]:
    """The routing weights, or a ValueError where there are none."""
    if weights is None:
        raise ValueError("a routed method needs a route: give forward a prompt mask or route weights")
    return weights
