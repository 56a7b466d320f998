"""Plots of a study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from milora_jax.errors import UserError
from milora_jax.evaluation.report import draw_shares, entitle, new_figure
from milora_jax.evaluation.study.tables import Place, Results


def plot_bars(path: Path, results: Results, places: Sequence[Place], title: str) -> None:
    """Draw the mean accuracy of each variant over the places, with a dot for every seed."""
    variants = results.variants[::-1]
    figure = new_figure(8.0, 0.36 * len(variants) + 1.4)
    axes = figure.subplots()
    for row, variant in enumerate(variants):
        by_seed = np.mean([results.accuracies(variant, place) for place in places], axis=0)
        axes.barh(row, np.median(by_seed), color="#7aa6c2", height=0.62, zorder=2)
        axes.scatter(by_seed, np.full(len(by_seed), row), color="#1b3a4b", s=14, zorder=3)
    axes.set_yticks(range(len(variants)), variants)
    axes.set(xlabel="accuracy in percent, mean over tasks (bar: median of the seeds)", xlim=(0, 100))
    axes.grid(axis="x", alpha=0.4, zorder=0)
    entitle(figure, title, "")
    figure.savefig(path, dpi=120)


def plot_lines(
    path: Path, results: Results, places: Sequence[Place], lines: dict[str, list[tuple[str, str]]], axis: str
) -> None:
    """Draw accuracy over a setting: one panel per place, a line of medians, and the seeds' range as a band.

    Args:
      lines: ``(tick, variant)`` along the axis, by label.
      axis: meaning of the ticks.
    """
    columns = min(3, len(places))
    rows = -(-len(places) // columns)
    figure = new_figure(4.6 * columns, 3.8 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    for panel, place in zip(panels, places, strict=False):
        for label, points in lines.items():
            values = [results.accuracies(variant, place) for _, variant in points]
            ticks = range(len(points))
            panel.plot(ticks, [np.median(v) for v in values], marker="o", label=label)
            panel.fill_between(ticks, [min(v) for v in values], [max(v) for v in values], alpha=0.2)
            panel.set_xticks(ticks, [tick for tick, _ in points])
        panel.set(xlabel=axis, title=place[1])
        panel.grid(alpha=0.4)
        panel.set_ylim(0, 103)
    for panel in panels[: len(places) : columns]:
        panel.set_ylabel("accuracy in percent")
    for panel in panels[len(places) :]:
        panel.set_visible(False)
    if len(lines) > 1:
        panels[0].legend()
    figure.savefig(path, dpi=120)


def plot_shares(path: Path, results: Results, variant: str, places: Sequence[Place], top_k: int) -> None:
    """Draw each expert's share of the chosen ones, per layer and task, mean over seeds (Figure 2)."""
    found = {
        place: [row for row in results.by_variant[variant][place] if row["expert_share"] is not None]
        for place in places
    }
    shares = {
        task: np.mean([row["expert_share"] for row in rows], axis=0) / top_k
        for (_, task), rows in found.items()
        if rows
    }
    if not shares:
        raise UserError(f"every run of {variant!r} diverged: there are no shares to draw")
    draw_shares(path, shares, "percent among the active experts", top=1.0 / top_k)
