"""Figures of routes with a title, named axes and a caption that says what to see."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from milora_jax.errors import UserError
from milora_jax.evaluation.report import (
    MODULES,
    ROUTES_TITLE,
    add_bar,
    draw_shares,
    entitle,
    layer_ticks,
    new_figure,
)
from milora_jax.evaluation.routing import PAPER_LIMIT, Routes, TaskRouting, distances, letters_of
from milora_jax.shapes import Float
from milora_jax.storage.files import write_json_atomic
from milora_jax.types import EXPERTS, LETTERS

REPORT_NAME = "routing.json"

STRIPS = 6
"""Number of prompts of a task that are drawn one by one."""


def plot_shares(path: Path, found: Sequence[TaskRouting]) -> None:
    """Draw Figure 2 of the paper: each expert's share of the choices in a layer, one panel per task."""
    top_k = found[0].top_k
    shares = {f"{each.task} ({each.prompts} prompts)": each.share for each in found}
    draw_shares(
        path,
        shares,
        "percent of the layer's choices",
        top=1.0 / top_k,
        title=ROUTES_TITLE,
        caption=f"{MODULES}\nA prompt chooses {top_k} of 7 in every layer, so a row sums to 100 and no cell "
        f"exceeds {100 / top_k:.0f}; without preference every cell is 14. In the paper none exceeds "
        f"{100 * PAPER_LIMIT:.0f}.",
    )


def plot_decisions(path: Path, found: Sequence[TaskRouting]) -> None:
    """Draw entropy, margin of the last choice and agreement of the prompts, per layer and task."""
    figure = new_figure(12.0, 4.3)
    panels = figure.subplots(1, 3)
    layers = range(len(found[0].entropy))
    for each in found:
        panels[0].plot(layers, each.entropy, marker="o", markersize=4, label=each.task)
        if each.margin is not None:
            panels[1].plot(layers, each.margin, marker="o", markersize=4)
        panels[2].plot(layers, each.agreement, marker="o", markersize=4)
    panels[0].axhline(np.log(len(EXPERTS)), color="gray", linestyle=":", linewidth=1)
    margin = "margin of the k-th choice (probability)"
    panels[0].set(title="How open is the choice?", ylabel="entropy of the router (nats)", ylim=(0.0, 2.05))
    panels[1].set(
        title="How clear is the last choice?",
        ylabel=margin,
        ylim=(0.0, None),
    )
    panels[2].set(
        title="Do prompts of a task agree?", ylabel="share with the commonest set", ylim=(0.0, 1.05)
    )
    for panel in panels:
        panel.set_xlabel("layer")
        panel.set_xticks(layer_ticks(len(layers)))
        panel.grid(alpha=0.3)
    figure.legend(loc="outside upper right", ncols=min(5, len(found)), fontsize=8)
    entitle(
        figure,
        "",
        "Left: 0 is sure, the dotted line (1.95) has no preference. Middle: by how much the last chosen "
        "expert was ahead of the first one left out; near 0 a small change of the prompt changes the route. "
        "Right: 1 means that one fixed set of experts would do for the task.",
    )
    figure.savefig(path, dpi=120)


def plot_distances(path: Path, tasks: Sequence[str], table: Float[np.ndarray, "tasks tasks"]) -> None:
    """Draw how different the routes of every two tasks are, as a matrix."""
    size = max(4.2, 0.85 * len(tasks) + 1.8)
    figure = new_figure(size + 1.4, size - 0.5)
    panel = figure.subplots()
    top = max(float(table.max()), 1e-3)
    image = panel.imshow(table, vmin=0.0, vmax=top, cmap="magma_r")
    panel.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right", fontsize=8)
    panel.set_yticks(range(len(tasks)), tasks, fontsize=8)
    panel.set(xlabel="task", ylabel="task")
    for (i, j), value in np.ndenumerate(table):
        color = "white" if value > 0.5 * top else "black"
        panel.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    add_bar(figure, image, panel, "Jensen-Shannon divergence (bits)")
    entitle(
        figure,
        "How different the routes of two tasks are",
        "Between the shares of the experts, mean over layers: 0 alike, 1 nothing shared.\n"
        "Diagonal: between two halves of one task's prompts, which is chance.",
    )
    figure.savefig(path, dpi=120)


def plot_strips(path: Path, routes: Mapping[str, Routes]) -> None:
    """Draw the routes of the first prompts of each task, one strip of layers by experts per prompt."""
    layers = next(iter(routes.values())).probs.shape[1]
    columns = min(STRIPS, max(len(each.probs) for each in routes.values()))
    figure = new_figure(1.75 * columns + 1.6, len(routes) * max(1.5, 0.12 * layers + 0.6))
    panels = figure.subplots(len(routes), columns, squeeze=False)
    for row, (task, each) in zip(panels, routes.items(), strict=True):
        for number, panel in enumerate(row):
            if number >= len(each.probs):
                panel.set_visible(False)
                continue
            image = panel.imshow(
                each.probs[number], vmin=0.0, vmax=0.5, cmap="viridis", aspect="auto", origin="lower"
            )
            for layer, expert in np.argwhere(each.weights[number] != 0):
                panel.plot(expert, layer, marker="s", color="white", markersize=3.5)
            panel.set_xticks(range(len(EXPERTS)), LETTERS, fontsize=7)
            panel.set_yticks(layer_ticks(layers))
            panel.tick_params(axis="y", labelsize=7)
            panel.set_title(f"prompt {number}", fontsize=8)
        row[0].set_ylabel(f"{task}\nlayer", fontsize=8)
    add_bar(figure, image, panels, "probability of the expert", extend="max")
    entitle(
        figure,
        "The route of single prompts",
        f"The first prompts of each file; white squares are the experts in force.\n{MODULES}",
    )
    figure.savefig(path, dpi=120)


def write_report(directory: Path, routes: dict[str, Routes], found: Sequence[TaskRouting]) -> None:
    """Write the figures and ``routing.json``; older files are replaced when all figures are drawn.

    Raises:
      UserError: the folder cannot be made or written; matplotlib is missing.
    """
    table, tasks = distances(routes), list(routes)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".drawing-", dir=directory) as folder:
            drawing = Path(folder)
            plot_shares(drawing / "shares.png", found)
            plot_decisions(drawing / "decisions.png", found)
            plot_strips(drawing / "strips.png", routes)
            plot_distances(drawing / "distances.png", tasks, table)
            for picture in drawing.iterdir():
                os.replace(picture, directory / picture.name)
    except ImportError:
        raise UserError("the pictures need the package matplotlib: pip install matplotlib") from None
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror or error}") from None
    report = {
        "experts": list(EXPERTS),
        "tasks": {each.task: each.to_json() for each in found},
        "distances": {"tasks": tasks, "bits": table.round(4).tolist()},
        "routes": {task: [letters_of(prompt) for prompt in each.weights] for task, each in routes.items()},
    }
    write_json_atomic(directory / REPORT_NAME, report)
