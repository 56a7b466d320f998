"""Tables and figures of a run's report."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from milora_jax.data.records import Record
from milora_jax.evaluation.loss import LEFT_OUT
from milora_jax.evaluation.score import Prediction, TaskScore
from milora_jax.types import EXPERTS, LETTERS

MODULES = "Experts are the linear modules of a layer: Q, K, V, O of attention; G (gate), U (up), D (down)."
ROUTES_TITLE = "Which experts the prompts choose, in percent"
HEALTH_CAPTION = (
    "Over the dev prompts, at every dev evaluation. Entropy: 0 is sure, the dotted line is no preference. "
    "Leading expert: the largest share of prompts with one and the same first choice; the dotted line is "
    "an even spread, 1 a router that has collapsed. Margin: by how much of the probability the last chosen "
    "expert is ahead of the first left out. Changed: choices, of a layer for a prompt, that were others the "
    "time before. Commonest route: prompts with one and the same set of experts; 1 is a router that does "
    "not see the prompt. Pooler: the largest share of one token in a prompt, mean over prompts."
)

TITLE_SIZE, LABEL_SIZE, CAPTION_SIZE = 12.0, 9.0, 8.0
"""Font sizes in points."""

LETTER_WIDTH = 0.58
"""Upper bound of the width of a letter in a line of DejaVu Sans, in ems."""

BAR_LENGTH, BAR_WIDTH = 3.0, 0.15
"""Length and width of a colour bar in inches, at most."""


TEXT_MEASURES = {"bleu": "BLEU", "chrf": "chrF", "rouge_l": "ROUGE-L"}
"""Names of the measures of free text in tables, by field."""

Figures = Mapping[str, Mapping[str, Any]]
"""The result of ``score.figures``."""


def figures_table(base: Figures, adapter: Figures) -> str:
    """Accuracy in percent, loss and perplexity before and after, one line per task and one for the mean
    accuracy; below them the measures of free text and the user's own, if there are any.
    """
    both, free = (base, adapter), [*adapter["measures"]]
    scored = [task for task in adapter["accuracy"] if task != "mean"]
    tasks = [*scored, *adapter.get("without_answers", ()), "mean"]
    width = max(map(len, ("free text", *tasks)))
    columns = {
        title: {task: tuple(shown(each[name].get(task)) for each in both) for task in tasks}
        for title, name, shown in (
            ("accuracy", "accuracy", _percent),
            ("loss", "loss", _loss),
            ("perplexity", "perplexity", _perplexity),
        )
    }
    *lines, mean = _before_and_after("task", tasks, columns, width)
    rule = "-" * len(lines[-1])
    lines = [*lines[:2], rule, *lines[2:], rule, mean.rstrip(" -")]
    if free:
        columns = {
            title: {task: tuple(f"{each['measures'][task][name]:.1f}" for each in both) for task in free}
            for name, title in TEXT_MEASURES.items()
        }
        first, second, *others = _before_and_after("free text", free, columns, width)
        lines += ["", first, second, rule, *others]
    if own := adapter.get("metric", {}):
        columns = {"metric": {task: tuple(_own(each["metric"][task]) for each in both) for task in own}}
        lines += ["", *_before_and_after("own metric", [*own], columns, max(width, len("own metric")))]
    return "\n".join(lines)


def _before_and_after(
    head: str, tasks: Sequence[str], columns: Mapping[str, Mapping[str, Sequence[str]]], width: int
) -> list[str]:
    """Two lines of titles and one line per task, with two cells in every column."""

    def line(first: str, cells: Iterable[Sequence[str]]) -> str:
        return f"{first:<{width}}" + "".join(f"   {base:>7}  {adapter:>8}" for base, adapter in cells)

    titles = " " * width + "".join(f"{title:>20}" for title in columns)
    under = line(head, [("base", "adapter")] * len(columns))
    return [titles, under, *(line(task, [cells[task] for cells in columns.values()]) for task in tasks)]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def _loss(mean: float | None) -> str:
    return "-" if mean is None else f"{mean:.3f}"


def _perplexity(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10_000 else f"{value:.1e}"


def _own(value: float) -> str:
    return f"{value:.4g}"


def answers_side_by_side(
    records: Sequence[Record], before: Sequence[str], after: Sequence[Prediction]
) -> str:
    """The first answers to a task of free text: the question, and the answers of base, adapter and row.

    Args:
      before: the base's answers to the first records.
      after: the adapter's answers to all of them.
    """
    lines = []
    for record, base, prediction in zip(records, before, after, strict=False):
        texts = {
            "asked": record.input or record.instruction,
            "base": base,
            "adapter": prediction.generated,
            "row": prediction.gold or "",
        }
        lines += [f"{name:8} {' '.join(text.split())}" for name, text in texts.items()]
        lines.append("")
    return "\n".join(lines)


def loss_notes(figures: Figures) -> list[str]:
    """A line for each task without answers, or whose loss does not cover all rows or is not finite."""
    lines = [
        f"note: {task}: its rows have no answers, so it has no accuracy"
        for task in figures.get("without_answers", ())
    ]
    for task, rows in figures["loss_rows"].items():
        if rows["left_out"]:
            left_out = sum(rows["left_out"].values())
            reasons = ", ".join(f"{LEFT_OUT[reason]}: {count}" for reason, count in rows["left_out"].items())
            of = f"{left_out} of {rows['scored'] + left_out} rows"
            lines.append(f"note: {task}: {of} have no loss ({reasons})")
        if rows["scored"] and figures["loss"][task] is None:
            lines.append(f"note: {task}: the loss is not finite")
    return lines


def score_table(scores: Sequence[TaskScore]) -> str:
    """Accuracy of each task in percent with its Wilson interval, rows, unread answers, loss and perplexity;
    and the measures of free text, if there are any.
    """
    width = max(len("task"), *(len(score.task) for score in scores))
    free = any(score.text is not None for score in scores)
    head = f"{'task':<{width}}  {'right':>6}  {'95 % interval':>15}  {'rows':>6}  {'unread':>6}"
    head += f"  {'loss':>6}  {'perplexity':>10}"
    own = any(score.metric is not None for score in scores)
    head += "".join(f"  {title:>7}" for title in TEXT_MEASURES.values() if free)
    lines = [head + "   metric" * own]
    for score in scores:
        interval = score.interval
        between = "-" if interval is None else f"{100 * interval.low:.1f} to {100 * interval.high:.1f}%"
        mean, perplexity = (None, None) if score.loss is None else (score.loss.mean, score.loss.perplexity)
        line = (
            f"{score.task:<{width}}  {_percent(score.accuracy):>6}  {between:>15}  "
            f"{len(score.predictions):>6}  {score.unread:>6}  {_loss(mean):>6}  {_perplexity(perplexity):>10}"
        )
        if score.text is not None:
            line += "".join(f"  {getattr(score.text, name):>7.1f}" for name in TEXT_MEASURES)
        elif free and own:
            line += f"  {'-':>7}" * len(TEXT_MEASURES)
        if score.metric is not None:
            line += f"  {_own(score.metric):>7}"
        lines.append(line)
    known = [score.accuracy for score in scores if score.accuracy is not None]
    if len(scores) > 1 and known:
        mean = sum(known) / len(known)
        lines.append(f"{'mean':<{width}}  {100 * mean:5.1f}%")
    return "\n".join(lines)


def plot_routing(path: Path, scores: list[TaskScore]) -> bool:
    """Draw which experts each layer chose, one panel per task (Figure 2 of the paper).

    Returns:
      Whether there was a route to draw.
    """
    drawn = [(score, score.expert_share) for score in scores if score.expert_share is not None]
    if not drawn:
        return False
    shares = {f"{score.task} ({len(score.predictions)} prompts)": share for score, share in drawn}
    chosen = round(float(drawn[0][1].sum(axis=1).mean()))
    caption = (
        f"{MODULES}\nA cell is the percent of a task's prompts that chose the expert; a prompt chooses "
        f"{chosen} of {len(EXPERTS)} in every layer."
    )
    draw_shares(path, shares, "percent of prompts choosing the expert", 1.0, ROUTES_TITLE, caption)
    return True


def new_figure(width: float, height: float) -> Any:
    """Make an empty matplotlib figure, in inches, that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_shares(
    path: Path, shares: Mapping[str, np.ndarray], label: str, top: float, title: str = "", caption: str = ""
) -> None:
    """Draw one panel per entry: ``[L, E]`` shares as colours and percentages.

    Args:
      label: meaning of a percentage.
      top: share with the brightest colour.
      title, caption: lines above and below the panels.
    """
    layers = next(iter(shares.values())).shape[0]
    columns = min(3, len(shares))
    rows = -(-len(shares) // columns)
    by_layer = 0.28 if layers <= 12 else 0.14  # with room for figures, or without
    figure = new_figure(3.9 * columns + 1.0, (by_layer * layers + 1.1) * rows)
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel, (name, share) in zip(panels.flat, shares.items(), strict=False):
        image = panel.imshow(
            100 * share, vmin=0.0, vmax=100 * top, cmap="viridis", aspect="auto", origin="lower"
        )
        panel.set_title(name, fontsize=10)
        panel.set_xticks(range(len(EXPERTS)), LETTERS, fontsize=8)
        panel.set_yticks(layer_ticks(layers))
        panel.set_ylabel("layer")
        panel.set_xlabel("expert")
        if layers <= 12:
            _write_shares(panel, share, top)
    for panel in panels.flat[len(shares) :]:
        panel.set_visible(False)
    add_bar(figure, image, panels, label)
    entitle(figure, title, caption)
    figure.savefig(path, dpi=120)


def add_bar(figure: Any, image: Any, panels: Any, label: str, **shown: Any) -> None:
    """Add a colour bar beside all panels.

    Args:
      image: the image whose colours it explains.
      label: meaning of the colours.
      shown: further arguments of ``Figure.colorbar``.
    """
    height = figure.get_figheight()
    length = min(BAR_LENGTH, 0.8 * height)
    bar = figure.colorbar(image, ax=panels, shrink=length / height, aspect=length / BAR_WIDTH, **shown)
    bar.set_label(wrapped(label, length, LABEL_SIZE), fontsize=LABEL_SIZE)


def entitle(figure: Any, title: str, caption: str) -> None:
    """Add a title above all panels of a figure and a caption below them, where they are not empty.

    Lines are wrapped at the figure's width, and the figure grows by their height, so that panels keep theirs.
    """
    for text, size, put in (
        (title, TITLE_SIZE, figure.suptitle),
        (caption, CAPTION_SIZE, figure.supxlabel),
    ):
        if text:
            lines = wrapped(text, figure.get_figwidth(), size)
            put(lines, fontsize=size)
            figure.set_figheight(figure.get_figheight() + 1.3 * size / 72 * (1 + lines.count("\n")))


def wrapped(text: str, width: float, size: float) -> str:
    """Wrap text to lines of at most ``width`` inches at ``size`` points."""
    letters = int(72 * width / (LETTER_WIDTH * size))
    return "\n".join(textwrap.fill(line, letters) for line in text.splitlines())


def plot_health(path: Path, metrics: Path) -> bool:
    """Draw how decided and how stable the router is over the steps, from ``metrics.jsonl``.

    Returns:
      Whether there was a router to draw.
    """
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    seen = [line for line in lines if line.get("route_entropy") is not None]
    if not seen:
        return False
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    steps = [line["step"] for line in seen]
    layers = len(seen[0]["route_entropy"])
    figure = new_figure(15.0, 5.6)
    panels = figure.subplots(2, 3)
    colors = colormaps["viridis"](np.linspace(0.0, 0.9, layers))
    largest = [np.max(line["expert_first"], axis=1) for line in seen]
    changed = [line["route_changed"] for line in seen]
    curves = (
        (panels[0, 0], [line["route_entropy"] for line in seen], "entropy (nats)", 2.0),
        (panels[0, 1], largest, "share of the leading expert", 1.0),
        # The log of an older version lacks these figures at first.
        (panels[0, 2], [line.get("route_common") for line in seen], "commonest route", 1.0),
        (panels[1, 2], [line.get("pooler_share") for line in seen], "pooler: leading token", 1.0),
    )
    for panel, values, label, top in curves:
        known = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
        for layer in range(layers if known else 0):
            its = [value[layer] for _, value in known]
            panel.plot([step for step, _ in known], its, color=colors[layer], marker="o", markersize=3)
        panel.set(ylabel=label, ylim=(0.0, 1.05 * top))
    panels[0, 0].axhline(np.log(len(EXPERTS)), color="gray", linestyle=":", linewidth=1)
    panels[0, 1].axhline(1 / len(EXPERTS), color="gray", linestyle=":", linewidth=1)
    if all(line["route_margin"] is not None for line in seen):
        for layer in range(layers):
            margins = [line["route_margin"][layer] for line in seen]
            panels[1, 0].plot(steps, margins, color=colors[layer], marker="o", markersize=3)
    panels[1, 0].set(ylabel="margin of the k-th choice", ylim=(0.0, None))
    known = [(step, value) for step, value in zip(steps, changed, strict=True) if value is not None]
    if known:
        panels[1, 1].plot(*zip(*known, strict=True), color="black", marker="o", markersize=3)
    panels[1, 1].set(ylabel="share of routes changed", ylim=(0.0, 1.05))
    for panel in panels.flat:
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    scale = ScalarMappable(Normalize(0, max(1, layers - 1)), ListedColormap(colors))
    add_bar(figure, scale, panels, "layer", ticks=layer_ticks(layers))
    entitle(figure, "How open, how even and how settled the choice of experts is", HEALTH_CAPTION)
    figure.savefig(path, dpi=120)
    return True


def layer_ticks(layers: int) -> list[int]:
    """At most about eight ticks, so that the labels of a 32-layer model do not overlap."""
    return list(range(0, layers, max(1, -(-layers // 8))))


def _write_shares(panel: Any, share: np.ndarray, top: float) -> None:
    """Write each cell's share in percent, dark on bright cells and bright on dark ones."""
    for (layer, expert), value in np.ndenumerate(share):
        color = "black" if value > 0.6 * top else "white"
        panel.text(expert, layer, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=color)
