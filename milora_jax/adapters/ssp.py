"""SSP: search which modules get an adapter, under a budget (Hu et al. 2022, arXiv 2206.07382).

The public description of S3PET says: every position of the network has a candidate module with a gate; the
gates' probabilities are trained on dev rows (bi-level); a shifted sigmoid keeps the expected size at the
budget; at the end the most probable positions within the budget remain. Our choices, where it says nothing:
candidates are LoRA pairs of twice the rank on the seven modules of every layer; during the search a pair is
weighted by its probability instead of a sampled gate; and the search is the first part of training instead of
a training of its own.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from milora_jax.adapters.hooks import LeafRole
from milora_jax.adapters.inputs import ExpertUse, Kernels, ProjectionGroup, Shape
from milora_jax.adapters.lora import TunedPairs
from milora_jax.adapters.low_rank import drop, init_pairs, narrow, of_group, widen
from milora_jax.adapters.records import LowRank
from milora_jax.config import COEFFICIENTS
from milora_jax.errors import one_of, require
from milora_jax.shapes import Array, Bool, Float, Int, Key
from milora_jax.types import EXPERTS, PyTree

DECIDED = 1e4
"""Gate logit of a decided position: far beyond any shift, so that the gate is exactly 0 or 1."""

WIDEST_SHIFT = 1e3
BISECTIONS = 40


@struct.dataclass
class SSPParams:
    """Candidate pairs and gates.

    Attributes:
      pairs: a candidate for every module.
      openness: logits of the positions' gates; a settled tree holds their probabilities instead.
    """

    pairs: dict[str, LowRank]
    openness: Float[Array, "*L E"]


@struct.dataclass
class Structure:
    """The decision of the search.

    Attributes:
      settled: whether the search has decided.
      chosen: the positions whose pair remains.
    """

    settled: Bool[Array, ""]
    chosen: Bool[Array, "L E"]


@dataclass(frozen=True)
class SSP(TunedPairs):
    """Sparse structure search.

    Attributes:
      rank: rank of LoRA with as many parameters as the budget; a candidate has twice the rank.
      coefficients: how the gates are trained.
      search_share: share of training after which the structure is decided.
      gate_learning_rate: peak learning rate of the gates where they are trained bi-level; their scale differs
        from that of rational coefficients.
    """

    name: ClassVar[str] = "ssp"
    all_modules: ClassVar[str] = "which searches for the modules itself"
    coefficients: str = "bilevel"
    search_share: float = 0.5
    gate_learning_rate: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("adapter.coefficients", self.coefficients, COEFFICIENTS)
        require(0 <= self.search_share < 1, "adapter.search_share", self.search_share, "from 0 to below 1")
        rate = self.gate_learning_rate
        require(math.isfinite(rate) and rate >= 0, "adapter.gate_learning_rate", rate, "0 or more")

    @property
    def scaled_rank(self) -> int:
        """The rank of a candidate."""
        return 2 * self.rank

    @property
    def theta(self) -> str:
        """How the gates, which are Theta, are trained."""
        return self.coefficients

    def theta_rate(self, rate: float) -> float:
        """The learning rate of the gates."""
        return self.gate_learning_rate

    def role(self, path: tuple[str, ...]) -> LeafRole:
        """The role of a leaf: the gates are Theta."""
        return LeafRole(coefficient=path[-1] == "openness", output=path[-1] == "b")

    def init(self, key: Key[Array, ""], shape: Shape, kernels: Kernels) -> SSPParams:
        """Make candidates that change nothing yet, with equal gates."""
        del kernels
        return SSPParams(
            pairs=init_pairs(key, shape, 2 * self.rank),
            openness=jnp.zeros((shape.num_layers, len(EXPERTS)), jnp.float32),
        )

    def settle(self, params: SSPParams) -> SSPParams:
        """Replace logits by probabilities whose expected size is the budget (shifted sigmoid)."""
        return dataclasses.replace(params, openness=budgeted(params.openness, _shares(params.pairs)))

    def folded(self, params: SSPParams) -> dict[str, LowRank]:
        """The candidates, with B multiplied by the position's probability."""
        return {
            name: LowRank(params.pairs[name].a, params.openness[i] * params.pairs[name].b)
            for i, name in enumerate(EXPERTS)
        }

    def changes(self, params: SSPParams, group: ProjectionGroup) -> tuple[Float[Array, "B T _"], ...]:
        """Every candidate's product times its probability."""
        u = narrow(params.pairs, group.names, drop(group.x, self.dropout, group.key)) * self.scale
        u = u * of_group(params.openness[None, None], group.names).astype(u.dtype)
        return widen(params.pairs, group.names, u)

    def init_memory(self, params: SSPParams) -> Structure:
        """A structure that is not decided yet."""
        return Structure(settled=jnp.zeros((), bool), chosen=jnp.zeros(params.openness.shape, bool))

    def after_update(
        self,
        params: SSPParams,
        grads: PyTree,
        memory: Structure,
        step: Int[Array, ""],
        total_steps: int,
        use: ExpertUse | None = None,
    ) -> tuple[SSPParams, Structure]:
        """Decide the structure once the search is over: the most probable positions within the budget."""
        del grads, use
        over = step > round(self.search_share * total_steps)
        fresh = within_budget(params.openness, _shares(params.pairs))
        chosen = jnp.where(over & ~memory.settled, fresh, memory.chosen)
        openness = jnp.where(over, jnp.where(chosen, DECIDED, -DECIDED), params.openness)
        return dataclasses.replace(params, openness=openness), Structure(memory.settled | over, chosen)

    def ready(self, step: int, total_steps: int) -> bool:
        """Whether the structure is decided."""
        return step > round(self.search_share * total_steps)

    def tunable_parameters(self, shape: Shape) -> int:
        """The budget, which bounds the size of the chosen positions."""
        return sum(shape.num_layers * self.rank * sum(dims) for _, dims in shape.modules)

    def count_parameters(self, params: SSPParams) -> int:
        """Number of parameters of the pairs at open positions."""
        open_layers = (np.asarray(params.openness) > 0).sum(axis=0)
        sizes = [params.pairs[name].a[0].size + params.pairs[name].b[0].size for name in EXPERTS]
        return int(np.dot(open_layers, sizes))


def within_budget(logits: Float[Array, "L E"], sizes: Float[Array, " E"]) -> Bool[Array, "L E"]:
    """The most probable positions that together hold at most half of all parameters.

    Positions are taken one after another; one that no longer fits is skipped for a smaller one.
    """
    order = jnp.argsort(-logits.reshape(-1))
    costs = jnp.broadcast_to(sizes[None], logits.shape).reshape(-1)
    # A small margin: rounding must not reject what exactly fills the budget.
    budget = 0.5 * costs.sum() * (1 + 1e-6)

    def take(used: Array, cost: Array) -> tuple[Array, Array]:
        fits = used + cost <= budget
        return jnp.where(fits, used + cost, used), fits

    _, fits = jax.lax.scan(take, jnp.zeros((), jnp.float32), costs[order])
    return jnp.zeros(costs.shape, bool).at[order].set(fits).reshape(logits.shape)


def budgeted(logits: Float[Array, "L E"], sizes: Float[Array, " E"]) -> Float[Array, "L E"]:
    """``sigmoid(logits - shift)`` with the shift at which the expected size is half of all parameters.

    The shift has no gradient: it follows the logits.
    """

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = 0.5 * (low + high)
        expected = jnp.mean(jax.nn.sigmoid(still - middle) * sizes[None])
        above = expected > 0.5 * jnp.mean(sizes)
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    still = jax.lax.stop_gradient(logits)
    bounds = jnp.float32(-WIDEST_SHIFT), jnp.float32(WIDEST_SHIFT)
    low, high = jax.lax.fori_loop(0, BISECTIONS, halve, bounds)
    return jax.nn.sigmoid(logits - 0.5 * (low + high))


def _shares(pairs: dict[str, LowRank]) -> Float[Array, " E"]:
    """Size of each module's candidate in one layer, relative to the mean."""
    sizes = [pairs[name].a.shape[-2] + pairs[name].b.shape[-1] for name in EXPERTS]
    return jnp.array(sizes, jnp.float32) * (len(sizes) / sum(sizes))
