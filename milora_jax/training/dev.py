"""The evaluation of an adapter on the dev rows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from milora_jax.adapters.protocol import Adapter
from milora_jax.console import LINE_EVERY
from milora_jax.parallel.processes import to_host
from milora_jax.training.health import (
    PromptRoutes,
    RoutingHealth,
    pack_routes,
    routing_health,
    unpack_routes,
)
from milora_jax.training.preference import objective_of, preference_figures
from milora_jax.training.prepare import Run
from milora_jax.training.progress import Progress
from milora_jax.training.step import Steps


@dataclass(frozen=True)
class Judged:
    """An adapter's figures on the dev rows.

    Attributes:
      perplexity: exp of the mean loss over all response tokens; with a preference objective over those of the
        chosen or desirable answers, for orpo with their prompts.
      loss: the mean of a preference objective over the dev prompts; None for supervised tuning.
      health: the routes of the prompts; None without a router.
      figures: what else a preference objective reports, under the names of ``metrics.jsonl``.
      answers: the measure of the answers to the dev rows, see :class:`DevAnswers`; None where none were
        generated.
    """

    perplexity: float
    loss: float | None
    health: RoutingHealth | None
    figures: dict[str, float | None]
    answers: float | None = None

    @property
    def measure(self) -> float:
        """The perplexity, or the loss of a preference objective, which tells whether a run learns."""
        return self.perplexity if self.loss is None else self.loss

    def to_json(self) -> dict[str, Any]:
        """Fields for ``metrics.jsonl``."""
        named = {f"dev_{name}": value for name, value in self.figures.items()}
        of_loss = {} if self.loss is None else {"dev_loss": self.loss}
        of_loss |= {} if self.answers is None else {"dev_answers": self.answers}
        health = {} if self.health is None else self.health.to_json()
        return {"dev_perplexity": self.perplexity, **of_loss, **named, **health}


class DevAnswers(Protocol):
    """Measures the answers to the dev rows, for a ``train.best_by`` other than loss.

    Attributes:
      name: of the measure: ``dev accuracy`` or ``dev metric``.
      lowest: whether the best adapter has the lowest value.
      fingerprint: SHA-256 of all that the measure depends on beside the adapter.
    """

    name: str
    lowest: bool
    fingerprint: str

    def __call__(self, adapter: Adapter) -> float:
        """Answer the dev rows with an adapter in training, and measure the answers."""
        ...


def judged_on_dev(
    run: Run,
    steps: Steps,
    adapter: Adapter,
    reference: Adapter | None,
    progress: Progress,
    log: Callable[[str], None],
) -> Judged:
    """Evaluate an adapter on all dev rows.

    Args:
      reference: the adapter of a preference objective's reference model; None for none.
      progress: stores the routes, with which the next evaluation compares its own.
      log: receives a line now and then.
    """
    train = run.config.train
    found: list[tuple[Any, ...]] = []
    seen: list[PromptRoutes] = []
    said = time.monotonic()
    for start in range(0, len(run.dev), train.batch_size):
        if time.monotonic() - said >= LINE_EVERY:
            said = time.monotonic()
            log(f"dev evaluation: {start} of {len(run.dev)} rows")
        batch = run.batch(run.dev, range(len(run.dev))[start : start + train.batch_size])
        more = (reference,) if train.prefers else ()
        *values, route = to_host(steps.evaluate(adapter, run.base, batch, *more))
        found.append(tuple(values))
        if route is not None:
            seen.append(PromptRoutes.of(route))
    loss, figures = None, {}
    if train.prefers:
        # In float64, batch by batch in their order.
        sums = jax.tree.map(lambda *each: np.sum(np.asarray(each, np.float64)), *(sums for (sums,) in found))
        total, count = float(sums.nll), int(sums.tokens)
        loss = objective_of(sums, train.objective)
        figures = preference_figures(sums, train.objective)
    else:
        total, count = 0.0, 0
        for part, tokens in found:
            total, count = total + float(part), count + int(tokens)
    perplexity = math.exp(min(total / max(count, 1), 700.0))
    return Judged(perplexity, loss, _health(run, seen, progress), figures)


def _health(run: Run, seen: list[PromptRoutes], progress: Progress) -> RoutingHealth | None:
    """The statistics of the dev prompts' routes; None without routes."""
    if not seen:
        return None
    before = unpack_routes(progress.dev_routes) if progress.dev_routes else None
    routes = PromptRoutes.joined(seen)
    progress.dev_routes = pack_routes(routes.chosen)
    sources = [example.source for row in run.dev for example in row[:: run.dev.answers]]
    return routing_health(routes, before, sources)
