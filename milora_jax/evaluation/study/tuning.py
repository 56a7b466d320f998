"""Choices on dev rows before any scoring: learning rates, and scales of methods that converge.

Every run that chooses has a seed that no table uses and reads dev rows only.
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
"""Target of the tuning of converged runs, beside :data:`MIXED`."""

Losses = dict[float, float]
"""Mean dev loss in nats by value of a grid; infinite where a run diverged."""

Key = tuple[str, str]
"""A method's label, and SINGLE or MIXED."""


@dataclass(frozen=True)
class Point:
    """The choices for a method that is trained to convergence.

    Attributes:
      scale: alpha over rank; None for a method without low-rank pairs.
    """

    learning_rate: float
    scale: float | None


@dataclass(frozen=True)
class Chosen:
    """The results of tuning.

    Attributes:
      rates: learning rates of the short budget, by label.
      points: choices for converged runs.
      rate_losses, converged_rate_losses, scale_losses: dev losses behind each choice of more than one value.
    """

    rates: Mapping[str, float] = field(default_factory=dict)
    points: Mapping[Key, Point] = field(default_factory=dict)
    rate_losses: Mapping[str, Losses] = field(default_factory=dict)
    converged_rate_losses: Mapping[Key, Losses] = field(default_factory=dict)
    scale_losses: Mapping[Key, Losses] = field(default_factory=dict)

    @classmethod
    def nothing(cls, study: Study) -> Chosen:
        """A placeholder before tuning, with which cells can be planned."""
        points = {(label, where): Point(0.0, None) for label in study.methods for where in (SINGLE, MIXED)}
        return cls(rates=dict.fromkeys(study.methods, 0.0), points=points)


def where_of(trained_on: str) -> str:
    """The target with which a converged run is tuned."""
    return MIXED if trained_on == MIXED else SINGLE


def keys_of(cells: Sequence[Cell]) -> tuple[list[str], list[Key]]:
    """The labels whose short learning rate some cells need, and the keys of their converged choices."""
    short = [cell.method for cell in cells if not cell.converged]
    long = [(cell.method, where_of(cell.trained_on)) for cell in cells if cell.converged]
    return list(dict.fromkeys(short)), list(dict.fromkeys(long))


def scaled(settings: AdapterSection, scale: float | None) -> AdapterSection:
    """Settings with alpha at a multiple of the rank; unchanged where the scale is None."""
    if scale is None:
        return settings
    return dataclasses.replace(settings, alpha=scale * (full_settings(build_method(settings)).rank or 0))


def short_cells(study: Study, label: str) -> dict[float, list[Cell]]:
    """One run per task with the short budget, by learning rate."""
    return {
        rate: [
            make_cell(study, label, label, study.methods[label], task, study.tuning_seed, rate, scored=False)
            for task in study.tasks
        ]
        for rate in study.learning_rates
    }


def converged_cells(study: Study, terms: Converged, key: Key, point: Point) -> list[Cell]:
    """One run per task of ``tuned_on`` and tuning seed, or on the mix, at one point."""
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
    """Make the choices that some cells need.

    Args:
      labels, keys: see :func:`keys_of`.
      losses_of: runs groups of cells under a title, and returns the mean dev loss of each.

    Raises:
      UserError: a method diverged at every learning rate.
    """
    short = {label: short_cells(study, label) for label in labels}
    rate_losses = _measured(short, losses_of, "tuning")
    rates = {label: _best(label, study.learning_rates, rate_losses.get(label)) for label in labels}
    terms = study.converged
    if terms is None or not keys:
        return Chosen(rates, {}, rate_losses)
    # At scale 1 first; then the scale at that learning rate, where scale 1 is known already.
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
    """1 for a method with a scale, else None."""
    return None if full_settings(build_method(study.methods[label])).alpha is None else 1.0


def _measured(
    grids: Mapping[Name, Mapping[float, list[Cell]]],
    losses_of: Callable[[list[list[Cell]], str], list[float]],
    title: str,
) -> dict[Name, Losses]:
    """Losses by key and value, for keys with more than one value to choose from."""
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
