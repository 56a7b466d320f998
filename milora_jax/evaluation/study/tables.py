"""Rows of a study as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from milora_jax.evaluation.statistics import Interval, paired_difference
from milora_jax.evaluation.study.cells import Row
from milora_jax.evaluation.study.settings import MIXED, Study

Place = tuple[str, str]
"""What a model was trained on, and the task it is scored on."""


@dataclass(frozen=True)
class Results:
    """Rows of one table by variant and place; the rows of a place come in the order of their seeds."""

    by_variant: Mapping[str, Mapping[Place, Sequence[Row]]]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Results:
        """Sort rows; variants keep the order in which they first come."""
        found: dict[str, dict[Place, list[Row]]] = {}
        for row in sorted(rows, key=lambda row: row["seed"]):
            place = row["trained_on"], row["task"]
            found.setdefault(row["variant"], {}).setdefault(place, []).append(row)
        order = dict.fromkeys(row["variant"] for row in rows)
        return cls({variant: found[variant] for variant in order})

    @property
    def variants(self) -> list[str]:
        """Names in order."""
        return list(self.by_variant)

    def places(self, mixed: bool | None = None) -> list[Place]:
        """Where every variant has rows: all places, or the mixed or single-task ones only."""
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
        """How many runs there are, and how many of them diverged."""
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

    def difference(self, ours: str, theirs: str, places: Sequence[Place]) -> Interval:
        """Accuracy of one variant less another's, in points, paired by place and seed."""
        return paired_difference(
            {"/".join(place): self.accuracies(ours, place) for place in places},
            {"/".join(place): self.accuracies(theirs, place) for place in places},
        )

    def mixing_loss(self, variant: str) -> Interval:
        """Accuracy trained on the mix less accuracy trained on the task alone, in points."""
        mixed = self.places(mixed=True)
        alone = {task: self.accuracies(variant, (task, task)) for _, task in mixed}
        return paired_difference({task: self.accuracies(variant, (MIXED, task)) for _, task in mixed}, alone)

    def mean(self, variant: str, places: Sequence[Place], field: str) -> float:
        """Mean of a number over the rows of some places that have it."""
        values = [
            row[field]
            for place in places
            for row in self.by_variant[variant][place]
            if row.get(field) is not None
        ]
        return float(np.mean(values)) if values else math.nan


def said(interval: Interval) -> str:
    """``+1.2 [-0.3, 2.7]``."""
    return f"{interval.mean:+.1f} [{interval.low:.1f}, {interval.high:.1f}]"


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first column to the left."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in body)])


def comparison(results: Results, subject: str, places: Sequence[Place], counts: bool) -> str:
    """Medians by place, their mean, the subject's paired lead over each variant, and the dev loss.

    Args:
      counts: whether to give tunable and active parameters and the learning rate.
    """
    extra = ["tunable", "active", "rate"] if counts else []
    head = [
        "variant",
        *extra,
        *(task for _, task in places),
        "mean",
        f"{subject} leads by",
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
        lead = "" if variant == subject else said(results.difference(subject, variant, places))
        body.append(
            [
                variant,
                *numbers,
                *(f"{results.median(variant, place):.1f}" for place in places),
                f"{results.mean_of_medians(variant, places):.1f}",
                lead,
                f"{results.dev_loss(variant, places):.3f}",
                results.runs(variant, places),
            ]
        )
    return markdown(head, body)


def dev_only(results: Results, places: Sequence[Place]) -> str:
    """Mean dev loss by place, for runs that choose: the lowest mean first."""
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


def mixing(results: Results, subject: str) -> str:
    """Table 2: single tasks against their mix."""
    mixed = results.places(mixed=True)
    single = [(task, task) for _, task in mixed]
    head = ["variant", "single", "mixed", "mixed less single", f"{subject} leads on single", "on mixed"]
    body = [
        [
            variant,
            f"{results.mean_of_medians(variant, single):.1f}",
            f"{results.mean_of_medians(variant, mixed):.1f}",
            said(results.mixing_loss(variant)),
            *(
                "" if variant == subject else said(results.difference(subject, variant, places))
                for places in (single, mixed)
            ),
        ]
        for variant in results.variants
    ]
    return markdown(head, body)


def tuned(losses: Mapping[str, Mapping[float, float]], study: Study) -> str:
    """Mean dev loss by method and learning rate, the chosen one in bold."""
    head = ["method", *(f"{rate:g}" for rate in study.learning_rates)]
    body = []
    for label, grid in losses.items():
        best = min(grid, key=grid.__getitem__)
        edge = len(grid) > 1 and best in (min(grid), max(grid))
        cells = [f"**{grid[r]:.3f}**" if r == best else f"{grid[r]:.3f}" for r in study.learning_rates]
        body.append([label, *cells, "yes" if edge else ""])
    return markdown([*head, "at the edge"], body)
