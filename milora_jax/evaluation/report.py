"""The table, the picture and the summary at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from milora_jax.evaluation.score import TaskScore
from milora_jax.types import EXPERTS


def accuracy_table(base: dict[str, float], adapter: dict[str, float]) -> str:
    """Accuracy in percent before and after, one line per task and one for the mean."""
    width = max(len("task"), *(len(task) for task in adapter))
    lines = [f"{'task':<{width}}  {'base':>6}  {'adapter':>7}"]
    lines += [f"{task:<{width}}  {100 * base[task]:5.1f}%  {100 * adapter[task]:6.1f}%" for task in adapter]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def plot_routing(path: Path, scores: list[TaskScore]) -> bool:
    """Draw which experts each layer chose, one panel per task (Figure 2 of the paper).

    Returns:
      Whether there was a route to draw.
    """
    drawn = [(score, score.expert_share) for score in scores if score.expert_share is not None]
    if not drawn:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = drawn[0][1].shape[0]
    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)
    height = max(2.4, 0.28 * layers + 1.3)
    figure = Figure(figsize=(3.9 * columns + 1.0, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel, (score, share) in zip(panels.flat, drawn, strict=False):
        image = panel.imshow(share, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto", origin="lower")
        panel.set_title(f"{score.task} ({len(score.predictions)} prompts)", fontsize=10)
        panel.set_xticks(range(len(EXPERTS)), EXPERTS, fontsize=8)
        panel.set_yticks(_layer_ticks(layers))
        panel.set_ylabel("layer")
        panel.set_xlabel("expert")
        if layers <= 12:
            _write_shares(panel, share)
    for panel in panels.flat[len(drawn) :]:
        panel.set_visible(False)
    figure.colorbar(image, ax=panels, label="share of prompts that chose the expert", shrink=0.8)
    figure.savefig(path, dpi=120)
    return True


def _layer_ticks(layers: int) -> list[int]:
    """At most about eight ticks, so that the labels of a 32-layer model do not touch."""
    return list(range(0, layers, max(1, -(-layers // 8))))


def _write_shares(panel: Any, share: np.ndarray) -> None:
    """Print each cell's share in percent, dark on bright cells and bright on dark ones."""
    for (layer, expert), value in np.ndenumerate(share):
        color = "black" if value > 0.6 else "white"
        panel.text(expert, layer, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=color)
