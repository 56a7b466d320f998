"""Rows of a study as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from milora_jax.evaluation.statistics import Difference, Interval, Sample, paired_difference
from milora_jax.evaluation.study.cells import Row
from milora_jax.evaluation.study.rows import ROUTED, RowScores, accuracy_sample, loss_sample
from milora_jax.evaluation.study.settings import MIXED
from milora_jax.evaluation.study.tuning import Losses, at_the_edge

Place = tuple[str, str]
"""The data that a model was trained on, and the task that it is scored on."""


@dataclass(frozen=True)
class Results:
    """The rows of one table by variant and place, in the order of their seeds."""

    by_variant: Mapping[str, Mapping[Place, Sequence[Row]]]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Results:
        """Sort rows; variants keep the order in which they first occur."""
        found: dict[str, dict[Place, list[Row]]] = {}
        for row in sorted(rows, key=lambda row: row["seed"]):
            place = row["trained_on"], row["task"]
            found.setdefault(row["variant"], {}).setdefault(place, []).append(row)
        order = dict.fromkeys(row["variant"] for row in rows)
        return cls({variant: found[variant] for variant in order})

    @property
    def variants(self) -> list[str]:
        """Names of the variants, in order."""
        return list(self.by_variant)

    def places(self, mixed: bool | None = None) -> list[Place]:
        """Places where every variant has rows: all of them, or only those of the mix or of single tasks."""
        first = next(iter(self.by_variant.values()))
        common = [p for p in first if all(p in places for places in self.by_variant.values())]
        return [p for p in common if mixed is None or (p[0] == MIXED) == mixed]

    def accuracies(self, variant: str, place: Place) -> list[float]:
        """Accuracy in percent, seed by seed."""
        return [100.0 * row["accuracy"] for row in self.by_variant[variant][place]]

    def median(self, variant: str, place: Place) -> float:
        """Median accuracy over the seeds, in percent."""
        return float(np.median(self.accuracies(variant, place)))

    def mean_of_medians(self, variant: str, places: Sequence[Place]) -> float:
        """Mean over places of the medians, in percent."""
        return float(np.mean([self.median(variant, place) for place in places]))

    def runs(self, variant: str, places: Sequence[Place]) -> str:
        """Number of runs, and how many of them diverged."""
        rows = [row for place in places for row in self.by_variant[variant][place]]
        diverged = sum("diverged" in row for row in rows)
        return f"{len(rows)}" + (f" ({diverged} diverged)" if diverged else "")

    def dev_loss(self, variant: str, places: Sequence[Place]) -> float:
        """Mean dev loss in nats; infinite where a run diverged."""
        losses = [
            math.inf if row["dev_perplexity"] is None else math.log(row["dev_perplexity"])
            for place in places
            for row in self.by_variant[variant][place]
        ]
        return float(np.mean(losses))

    def test_loss(self, variant: str, places: Sequence[Place]) -> float:
        """Mean test loss in nats over places and seeds; infinite where a run diverged."""
        losses = [
            math.inf if row["loss"] is None else row["loss"]
            for place in places
            for row in self.by_variant[variant][place]
        ]
        return float(np.mean(losses))

    def scores(self, variant: str, place: Place, route: str = ROUTED) -> list[RowScores]:
        """Scores of the test rows, seed by seed.

        Args:
          route: the route under which the rows were scored.
        """
        return [row["scores"][route] for row in self.by_variant[variant][place]]

    def samples(
        self,
        variant: str,
        places: Sequence[Place],
        sample: Callable[[Sequence[RowScores]], Sample],
        route: str = ROUTED,
        rows: int = 0,
    ) -> dict[str, Sample]:
        """Samples of one figure by task, for ``statistics.paired_difference``.

        Args:
          rows: test rows of each task, from the first; 0 is all of them.
        """
        scores = {place[1]: self.scores(variant, place, route) for place in places}
        return {task: sample([each.first(rows) for each in mine]) for task, mine in scores.items()}

    def lead(self, ours: str, theirs: str, places: Sequence[Place]) -> list[str]:
        """The lead of one variant over another: accuracy in points, loss in nats and in percent."""
        points = paired_difference(*(self.samples(v, places, accuracy_sample) for v in (ours, theirs)))
        loss = paired_difference(*(self.samples(v, places, loss_sample) for v in (ours, theirs)))
        return [said(points.absolute), said(loss.absolute, 3), percent(loss.relative)]

    def mixing_loss(self, variant: str) -> list[str]:
        """The lead, as in :meth:`lead`, of training on the mix over training on the task alone."""
        mixed, alone = self.both_ways()

        def difference(sample: Callable[[Sequence[RowScores]], Sample]) -> Difference:
            return paired_difference(*(self.samples(variant, places, sample) for places in (mixed, alone)))

        return [said(difference(accuracy_sample).absolute), percent(difference(loss_sample).relative)]

    def both_ways(self) -> tuple[list[Place], list[Place]]:
        """Tasks of the mix on which variants are also trained alone: their places in the mix, and alone."""
        single = self.places(mixed=False)
        mixed = [(where, task) for where, task in self.places(mixed=True) if (task, task) in single]
        return mixed, [(task, task) for _, task in mixed]

    def mean(self, variant: str, places: Sequence[Place], field: str) -> float:
        """Mean of a field over the rows of some places that have it."""
        values = [
            row[field]
            for place in places
            for row in self.by_variant[variant][place]
            if row.get(field) is not None
        ]
        return float(np.mean(values)) if values else math.nan


def said(interval: Interval, digits: int = 1) -> str:
    """``+1.2 [-0.3, 2.7]``; a difference from a run that diverged is not a number.

    >>> said(Interval(1.2, -0.3, 2.7))
    '+1.2 [-0.3, 2.7]'
    """
    if not math.isfinite(interval.mean):
        return "diverged"
    return f"{interval.mean:+.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def percent(share: Interval) -> str:
    """A share in percent, in the form of :func:`said`."""
    return said(Interval(*(100 * value for value in (share.mean, share.low, share.high))))


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is aligned to the left."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in body)])


def comparison(results: Results, subject: str, places: Sequence[Place], counts: bool) -> str:
    """Medians by place, their mean and the test loss, each with the subject's paired lead, and the dev loss.

    Args:
      counts: whether to include tunable and active parameters and the learning rate.
    """
    extra = ["tunable", "active", "rate"] if counts else []
    head = [
        "variant",
        *extra,
        *(task for _, task in places),
        "mean",
        f"{subject} leads by",
        "test loss",
        f"that of {subject} is higher by",
        "in percent",
        "dev loss",
        "scored",
    ]
    body = []
    for variant in results.variants:
        numbers = (
            [
                f"{results.mean(variant, places, 'tunable_parameters'):,.0f}",
                f"{results.mean(variant, places, 'active_parameters'):,.0f}",
                f"{results.mean(variant, places, 'learning_rate'):g}",
            ]
            if counts
            else []
        )
        points, nats, share = ["", "", ""] if variant == subject else results.lead(subject, variant, places)
        body.append(
            [
                variant,
                *numbers,
                *(f"{results.median(variant, place):.1f}" for place in places),
                f"{results.mean_of_medians(variant, places):.1f}",
                points,
                f"{results.test_loss(variant, places):.3f}",
                nats,
                share,
                f"{results.dev_loss(variant, places):.3f}",
                results.runs(variant, places),
            ]
        )
    return markdown(head, body)


def dev_only(results: Results, places: Sequence[Place]) -> str:
    """Mean dev loss by place, for runs that choose, the lowest first."""
    body = [
        [
            variant,
            *(f"{results.dev_loss(variant, [place]):.3f}" for place in places),
            f"{results.dev_loss(variant, places):.3f}",
            results.runs(variant, places),
        ]
        for variant in sorted(results.variants, key=lambda variant: results.dev_loss(variant, places))
    ]
    return markdown(["variant", *(task for _, task in places), "mean dev loss", "runs"], body)


def mixing(results: Results) -> str:
    """Table 2: single tasks against their mix."""
    mixed, single = results.both_ways()
    head = ["variant", "single", "mixed", "mixed less single", "loss single", "loss mixed", "in percent"]
    body = []
    for variant in results.variants:
        points, share = results.mixing_loss(variant)
        body.append(
            [
                variant,
                *(f"{results.mean_of_medians(variant, places):.1f}" for places in (single, mixed)),
                points,
                *(f"{results.test_loss(variant, places):.3f}" for places in (single, mixed)),
                share,
            ]
        )
    return markdown(head, body)


def routes(results: Results) -> str:
    """How the dev prompts were routed at the best step, mean over runs; empty where no run routed."""
    head = ["variant", "trained on", "share one route", "within a task", "across tasks", "blind layers"]
    body = []
    for variant, by_place in results.by_variant.items():
        for mixed in (False, True):
            places = [place for place in by_place if (place[0] == MIXED) == mixed]
            found = [row["routing"] for place in places for row in by_place[place] if row.get("routing")]
            if not found:
                continue
            figures = {
                name: [each[name] for each in found if name in each]
                for name in ("common", "agree", "across", "blind", "pooler_share", "spread")
            }
            means = [
                ""
                if not values
                else f"{np.mean(values):.0%}"
                if name != "spread"
                else f"{np.mean(values):.2f}"
                for name, values in figures.items()
            ]
            largest = f"{max(each['largest'] for each in found):.1f}"
            body.append([variant, MIXED if mixed else "single tasks", *means, largest])
    return markdown([*head, "pooler on one token", "feature spread", "largest input"], body) if body else ""


def tuned(losses: Mapping[str, Losses], grid: Sequence[float]) -> str:
    """Mean dev loss by method and value of a grid, with the chosen one in bold."""
    body = []
    for label, found in losses.items():
        best = min(found, key=found.__getitem__)
        cells = [f"**{found[value]:.3f}**" if value == best else f"{found[value]:.3f}" for value in grid]
        body.append([label, *cells, "yes" if at_the_edge(best, found) else ""])
    return markdown(["method", *(f"{value:g}" for value in grid), "at the edge"], body)
