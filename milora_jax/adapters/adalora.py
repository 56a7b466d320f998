"""AdaLoRA: pairs whose ranks are pruned to a budget while training (Zhang et al. 2023, arXiv 2303.10512).

A module's change is ``A diag(e) B``. Columns of A, values e and rows of B are triplets; the least
important of all modules and layers lose their value e, on a cubic schedule, until the budget is met.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from milora_jax.adapters.hooks import LeafRole
from milora_jax.adapters.inputs import ExpertUse, Kernels, ProjectionGroup, Shape
from milora_jax.adapters.lora import TunedPairs
from milora_jax.adapters.low_rank import drop, narrow, widen
from milora_jax.adapters.records import LowRank
from milora_jax.errors import require
from milora_jax.shapes import Array, Bool, Float, Int, Key
from milora_jax.types import EXPERTS, PyTree


@struct.dataclass
class Triplets:
    """One module's triplets, stacked over layers outside a layer.

    Attributes:
      a, b: drawn with standard deviation 0.02, kept near orthogonal by the penalty.
      singular: e, zero at the start so that nothing changes, and zero where pruned.
    """

    a: Float[Array, "*L d_in R"]
    b: Float[Array, "*L R d_out"]
    singular: Float[Array, "*L R"]


@struct.dataclass
class Importance:
    """State of AdaLoRA between steps.

    Attributes:
      mean: moving average of the sensitivity ``|w g|`` of every weight.
      spread: moving average of the distance of the sensitivity from that mean.
      settled: whether the last pruning is done.
      kept: the triplets that the last pruning kept, modules in the order of ``types.EXPERTS``.
    """

    mean: PyTree
    spread: PyTree
    settled: Bool[Array, ""]
    kept: Bool[Array, "E L R"]


@dataclass(frozen=True)
class AdaLoRA(TunedPairs):
    """AdaLoRA and its settings.

    Attributes:
      rank: mean rank of a module after pruning.
      initial_rank: rank of every module before pruning; 0 means twice ``rank``, as in the paper.
      orthogonality: weight of the penalty that keeps A and B orthogonal.
      prune_start, prune_end: shares of training between which the budget shrinks.
      prune_every: steps between two prunings.
      sensitivity_decay, spread_decay: decay of the two moving averages.
    """

    name: ClassVar[str] = "adalora"
    all_modules: ClassVar[str] = "which divides its ranks among all seven modules of a layer itself"
    initial_rank: int = 0
    orthogonality: float = 0.5
    prune_start: float = 0.1
    prune_end: float = 0.7
    prune_every: int = 10
    sensitivity_decay: float = 0.85
    spread_decay: float = 0.85

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.initial_rank == 0 or self.initial_rank >= self.rank
        require(fits, "adapter.initial_rank", self.initial_rank, f"0 or at least rank {self.rank}")
        require(self.orthogonality >= 0, "adapter.orthogonality", self.orthogonality, "0 or more")
        ordered = 0 <= self.prune_start < self.prune_end <= 1
        span = (self.prune_start, self.prune_end)
        require(ordered, "adapter.prune_start, prune_end", span, "two rising shares from 0 to 1")
        require(self.prune_every >= 1, "adapter.prune_every", self.prune_every, "at least 1")
        for name in ("sensitivity_decay", "spread_decay"):
            value = getattr(self, name)
            require(0 <= value < 1, f"adapter.{name}", value, "from 0 to below 1")

    @property
    def first_rank(self) -> int:
        """R while training: the rank before any pruning."""
        return self.initial_rank or 2 * self.rank

    @property
    def scaled_rank(self) -> int:
        """The rank before pruning, which PEFT calls ``ranknum``."""
        return self.first_rank

    def role(self, path: tuple[str, ...]) -> LeafRole:
        """The role of a leaf: none is a B that starts at zero, since A and B play the same part."""
        del path
        return LeafRole()

    def init(self, key: Key[Array, ""], shape: Shape, kernels: Kernels) -> dict[str, Triplets]:
        """Draw A and B at random and set every value to zero, so that nothing changes."""
        del kernels
        layers, rank, params = shape.num_layers, self.first_rank, {}
        for module_key, (name, (d_in, d_out)) in zip(jax.random.split(key, 7), shape.modules, strict=True):
            a_key, b_key = jax.random.split(module_key)
            params[name] = Triplets(
                a=0.02 * jax.random.normal(a_key, (layers, d_in, rank), jnp.float32),
                b=0.02 * jax.random.normal(b_key, (layers, rank, d_out), jnp.float32),
                singular=jnp.zeros((layers, rank), jnp.float32),
            )
        return params

    def folded(self, params: dict[str, Triplets]) -> dict[str, LowRank]:
        """LoRA's pairs, with each value multiplied into its row of B."""
        return {name: LowRank(mine.a, mine.singular[:, None] * mine.b) for name, mine in params.items()}

    def changes(
        self, params: dict[str, Triplets], group: ProjectionGroup
    ) -> tuple[Float[Array, "B T _"], ...]:
        """``s x A diag(e) B`` of every module."""
        u = narrow(params, group.names, drop(group.x, self.dropout, group.key)) * self.scale
        values = jnp.stack([params[name].singular for name in group.names])
        return widen(params, group.names, u * values[None, None].astype(u.dtype))

    def penalty(self, params: dict[str, Triplets]) -> Float[Array, ""]:
        """Mean of ``|A^T A - I|_F`` and ``|B B^T - I|_F`` over all matrices, times its weight."""
        distances = []
        for triplets in params.values():
            for gram in (
                jnp.einsum("LDR,LDS->LRS", triplets.a, triplets.a, precision=jax.lax.Precision.HIGHEST),
                jnp.einsum("LRD,LSD->LRS", triplets.b, triplets.b, precision=jax.lax.Precision.HIGHEST),
            ):
                square = jnp.sum((gram - jnp.eye(gram.shape[-1])[None]) ** 2, axis=(-2, -1))
                # The norm has no gradient at 0, which an orthogonal matrix reaches.
                distances.append(jnp.mean(jnp.sqrt(square + 1e-12)))
        return self.orthogonality * jnp.mean(jnp.stack(distances))

    def init_memory(self, params: dict[str, Triplets]) -> Importance:
        """A state with all triplets kept and averages of zero."""
        return Importance(
            mean=jax.tree.map(jnp.zeros_like, params),
            spread=jax.tree.map(jnp.zeros_like, params),
            settled=jnp.zeros((), bool),
            kept=jnp.ones((len(EXPERTS), *params[EXPERTS[0]].singular.shape), bool),
        )

    def budgets(self, first: int, last: int, total_steps: int) -> Int[np.ndarray, " steps"]:
        """The number of triplets to keep after each step: ``first``, a cubic fall, then ``last`` (Eq. 12)."""
        start, end = self._pruning_steps(total_steps)
        # In float64 on the host, as in PEFT: float32 is sometimes off by one triplet.
        left = 1.0 - np.clip((np.arange(total_steps + 1) - start) / (end - start), 0.0, 1.0)
        return (last + (first - last) * left**3).astype(np.int32)

    def after_update(
        self,
        params: dict[str, Triplets],
        grads: dict[str, Triplets],
        memory: Importance,
        step: Int[Array, ""],
        total_steps: int,
        use: ExpertUse | None = None,
    ) -> tuple[dict[str, Triplets], Importance]:
        """Update the importance of every weight, and prune at the steps of the schedule.

        Until the budget is met a pruned value may grow again from its gradient; afterwards pruned triplets
        stay pruned.
        """
        del use
        _, end = self._pruning_steps(total_steps)
        mean, spread = self._importance(params, grads, memory, looks=step < end)
        scores = jnp.stack([_triplet_scores(mean[name], spread[name]) for name in EXPERTS])
        budgets = self.budgets(scores.size, scores.size // self.first_rank * self.rank, total_steps)
        place = jnp.argsort(jnp.argsort(-scores.reshape(-1))).reshape(scores.shape)
        fresh = place < jnp.asarray(budgets)[jnp.minimum(step, total_steps)]
        # Not "step == end": the update at the end may be skipped because it is not finite.
        due = ~memory.settled & ((step % self.prune_every == 0) | (step >= end))
        kept = jnp.where(due, fresh, memory.kept)
        stays = kept | ~(due | memory.settled)
        pruned = {
            name: dataclasses.replace(params[name], singular=jnp.where(stays[i], params[name].singular, 0.0))
            for i, name in enumerate(EXPERTS)
        }
        settled = memory.settled | (step >= end)
        return pruned, Importance(mean=mean, spread=spread, settled=settled, kept=kept)

    def _importance(
        self, params: PyTree, grads: PyTree, memory: Importance, looks: Bool[Array, ""]
    ) -> tuple[PyTree, PyTree]:
        """Update the moving averages with this step's sensitivities where ``looks`` is true.

        The last pruning ignores the gradient of its own step, as in PEFT.
        """
        beta1, beta2 = self.sensitivity_decay, self.spread_decay
        seen = jax.tree.map(lambda w, g: jnp.abs(w * g), params, grads)
        mean = jax.tree.map(lambda old, new: beta1 * old + (1 - beta1) * new, memory.mean, seen)
        spread = jax.tree.map(
            lambda old, new, mid: beta2 * old + (1 - beta2) * jnp.abs(new - mid), memory.spread, seen, mean
        )
        return jax.tree.map(
            lambda new, old: jnp.where(looks, new, old), (mean, spread), (memory.mean, memory.spread)
        )

    def ready(self, step: int, total_steps: int) -> bool:
        """Whether the budget is met."""
        return step >= self._pruning_steps(total_steps)[1]

    def _pruning_steps(self, total_steps: int) -> tuple[int, int]:
        start = min(round(self.prune_start * total_steps), total_steps - 1)
        return start, max(start + 1, round(self.prune_end * total_steps))

    def tunable_parameters(self, shape: Shape) -> int:
        """The budget of triplets, at the mean size of a triplet."""
        return sum(shape.num_layers * self.rank * (sum(dims) + 1) for _, dims in shape.modules)

    def count_parameters(self, params: dict[str, Triplets]) -> int:
        """The size of the triplets whose value is not zero; it differs from module to module."""
        return sum(
            int((np.asarray(mine.singular) != 0).sum()) * (mine.a.shape[-2] + mine.b.shape[-1] + 1)
            for mine in params.values()
        )


def _triplet_scores(mean: Triplets, spread: Triplets) -> Float[Array, "L R"]:
    """Importance of each triplet: that of its value plus the means over its column and its row (Eq. 10)."""
    score = jax.tree.map(jnp.multiply, mean, spread)
    return score.singular + score.a.mean(axis=-2) + score.b.mean(axis=-1)
