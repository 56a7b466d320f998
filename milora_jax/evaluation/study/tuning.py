"""What is chosen on dev rows before anything is scored: learning rates, and scales of what converges.

Every run that chooses has a seed that no table uses and looks at dev rows only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from milora_jax.adapters.registry import build_method, full_settings
from milora_jax.config import AdapterSection
from milora_jax.errors import UserError
from milora_jax.evaluation.study.cells import Cell, make_cell
from milora_jax.evaluation.study.settings import MIXED, Converged, Study

Name = TypeVar("Name", str, tuple[str, str])

SINGLE = "single tasks"
"""Beside :data:`MIXED`, what converged runs are tuned for."""

Losses = dict[float, float]
"""Mean dev loss in nats by value of a grid; infinite where a run diverged."""

Key = tuple[str, str]
"""Label of a method, and SINGLE or MIXED."""


@dataclass(frozen=True)
class Point:
    """What was chosen for a method that is to converge.

    Attributes:
      scale: alpha over rank; None of a method without low-rank pairs.
    """

    learning_rate: float
    scale: float | None


@dataclass(frozen=True)
class Chosen:
    """What tuning has found.

    Attributes:
      rates: learning rates of the short budget, by label.
      points: of what converges.
      rate_losses, converged_rate_losses, scale_losses: what they were chosen from, where there was more than
        one value.
    """

    rates: Mapping[str, float] = field(default_factory=dict)
    points: Mapping[Key, Point] = field(default_factory=dict)
    rate_losses: Mapping[str, Losses] = field(default_factory=dict)
    converged_rate_losses: Mapping[Key, Losses] = field(default_factory=dict)
    scale_losses: Mapping[Key, Losses] = field(default_factory=dict)

    @classmethod
    def nothing(cls, study: Study) -> Chosen:
        """Stands for what is not known yet, to see which cells there will be."""
        points = {(label, where): Point(0.0, None) for label in study.methods for where in (SINGLE, MIXED)}
        return cls(rates=dict.fromkeys(study.methods, 0.0), points=points)


def where_of(trained_on: str) -> str:
    """What a converged run is tuned with."""
    return MIXED if trained_on == MIXED else SINGLE


def keys_of(cells: Sequence[Cell]) -> tuple[list[str], list[Key]]:
    """The labels whose short learning rate some cells need, and what they need that converges."""
    short = [cell.method for cell in cells if not cell.converged]
    long = [(cell.method, where_of(cell.trained_on)) for cell in cells if cell.converged]
    return list(dict.fromkeys(short)), list(dict.fromkeys(long))


def scaled(settings: AdapterSection, scale: float | None) -> AdapterSection:
    """Settings with alpha at a multiple of the rank; as they are where the scale is None."""
    if scale is None:
        return settings
    return dataclasses.replace(settings, alpha=scale * (full_settings(build_method(settings)).rank or 0))


def short_cells(study: Study, label: str) -> dict[float, list[Cell]]:
    """By learning rate one run per task, with the short budget."""
    return {
        rate: [
            make_cell(study, label, label, study.methods[label], task, study.tuning_seed, rate, scored=False)
            for task in study.tasks
        ]
        for rate in study.learning_rates
    }


def converged_cells(study: Study, terms: Converged, key: Key, point: Point) -> list[Cell]:
    """At one point a run per task of ``tuned_on`` and tuning seed, or on the mix."""
    label, where = key
    tasks = (MIXED,) if where == MIXED else terms.tuned_on or study.alone
    return [
        make_cell(
            study,
            f"{label} at {point.learning_rate:g}, scale {point.scale or 1:g}",
            label,
            scaled(study.methods[label], point.scale),
            task,
            seed,
            point.learning_rate,
            scored=False,
            converged=terms,
        )
        for seed in range(study.tuning_seed, study.tuning_seed + terms.tuning_seeds)
        for task in tasks
    ]


def choose(
    study: Study,
    labels: Sequence[str],
    keys: Sequence[Key],
    losses_of: Callable[[list[list[Cell]], str], list[float]],
) -> Chosen:
    """Choose what some cells need.

    Args:
      labels, keys: see :func:`keys_of`.
      losses_of: runs groups of cells, under a title, and gives the mean dev loss of each.

    Raises:
      UserError: a method diverged at every learning rate.
    """
    short = {label: short_cells(study, label) for label in labels}
    rate_losses = _measured(short, losses_of, "tuning")
    rates = {label: _best(label, study.learning_rates, rate_losses.get(label)) for label in labels}
    terms = study.converged
    if terms is None or not keys:
        return Chosen(rates, {}, rate_losses)
    # At scale 1 first; then the scale at that learning rate, of which 1 is known already.
    first = {key: _scale_of(study, key[0]) for key in keys}
    found = _measured(
        {
            key: {r: converged_cells(study, terms, key, Point(r, scale)) for r in terms.learning_rates}
            for key, scale in first.items()
        },
        losses_of,
        "tuning to convergence",
    )
    best = {key: _best(key[0], terms.learning_rates, found.get(key)) for key in keys}
    scaling = [key for key, scale in first.items() if scale is not None]
    scales = _measured(
        {
            key: {s: converged_cells(study, terms, key, Point(best[key], s)) for s in terms.scales}
            for key in scaling
        },
        losses_of,
        "tuning the scale",
    )
    points = {
        key: Point(best[key], _best(key[0], terms.scales, scales.get(key)) if key in scaling else None)
        for key in keys
    }
    return Chosen(rates, points, rate_losses, found, scales)


def _scale_of(study: Study, label: str) -> float | None:
    """1 for a method with a scale."""
    return None if full_settings(build_method(study.methods[label])).alpha is None else 1.0


def _measured(
    grids: Mapping[Name, Mapping[float, list[Cell]]],
    losses_of: Callable[[list[list[Cell]], str], list[float]],
    title: str,
) -> dict[Name, Losses]:
    """Losses by key and value, where there is more than one value to choose from."""
    open_ones = {key: grid for key, grid in grids.items() if len(grid) > 1}
    groups = [cells for grid in open_ones.values() for cells in grid.values()]
    losses = iter(losses_of(groups, title) if groups else [])
    return {key: {value: next(losses) for value in grid} for key, grid in open_ones.items()}


def _best(label: str, grid: Sequence[float], losses: Losses | None) -> float:
    if losses is None:
        return grid[0]
    if not any(map(math.isfinite, losses.values())):
        raise UserError(f"study method {label!r} diverged at every one of {tuple(losses)}")
    return min(losses, key=losses.__getitem__)


def at_the_edge(value: float, grid: Losses) -> bool:
    """Whether a value is the least or the greatest of a grid."""
    return len(grid) > 1 and value in (min(grid), max(grid))
