"""Where the figures of a run go: ``metrics.jsonl`` always, TensorBoard and Weights & Biases if asked for.

A tracker shows what ``metrics.jsonl`` holds and nothing else. One that fails, because the network or the
disk is gone, is given up with one line: the training goes on, and the file is whole.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from milora_jax.config import Config, tracker_names
from milora_jax.errors import UserError
from milora_jax.parallel.processes import is_first
from milora_jax.shapes import Float, UInt
from milora_jax.training.workdir import MetricsLog
from milora_jax.types import EXPERTS, LETTERS

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""What each tracker needs; the extra that installs it has the tracker's name."""

TAGS = {
    "loss": "train/loss",
    "cross_entropy": "train/cross_entropy",
    "load_balance": "train/load_balance",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "tokens_per_second": "train/tokens_per_second",
    "bad_steps": "train/bad_steps",
    "dev_perplexity": "dev/perplexity",
    "router_grad_norm": "train/router_grad_norm",
    "balance_weight": "routing/balance_weight",
    "top_k": "routing/top_k",
    "pooled_max": "routing/pooled_max",
    "route_common": "routing/common_route",
    "route_agree": "routing/agree_within_source",
    "route_across": "routing/agree_across_sources",
    "router_input_max": "routing/input_max",
    "feature_spread": "routing/feature_spread",
    "pooler_share": "routing/pooler_share",
    "route_entropy": "routing/entropy",
    "route_margin": "routing/margin",
    "route_changed": "routing/changed",
}
"""Names under which the figures of ``metrics.jsonl`` are shown; of one value per layer, the mean."""

SHARES = {"expert_share": "routing/expert_share", "expert_first": "routing/first_choice"}
"""Shares per layer and expert, shown as pictures."""


class Tracker(Protocol):
    """Somewhere that figures are sent."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take the figures of a step, under the names of ``metrics.jsonl``."""
        ...

    def close(self) -> None:
        """Bring everything to where it belongs; nothing is logged afterwards."""
        ...


class RunLog:
    """A run's log: the file, and the trackers that the config asks for. Only the first process has any."""

    def __init__(self, workdir: Path, config: Config, resume_step: int, say: Callable[[str], None]) -> None:
        """Open the log.

        Args:
          resume_step: the step at which training goes on; what was logged of later ones is forgotten.
          say: receives one line when a tracker is given up.
        """
        self._say = say
        self._file = MetricsLog(workdir, resume_step, say)
        self._trackers: dict[str, Tracker] = {}
        for name in tracker_names(config.train.trackers) if is_first() else ():
            self._try(name, lambda name=name: self._open(name, workdir, config, resume_step))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write a line, and tell every tracker that still works."""
        self._file.write(step, dict(metrics))
        for name, tracker in list(self._trackers.items()):
            self._try(name, lambda tracker=tracker: tracker.log(step, metrics))

    def close(self) -> None:
        """Close the trackers."""
        for name, tracker in list(self._trackers.items()):
            self._try(name, tracker.close)
        self._trackers = {}

    def _open(self, name: str, workdir: Path, config: Config, resume_step: int) -> None:
        if name == "tensorboard":
            from milora_jax.training.tensorboard import TensorBoard

            self._trackers[name] = TensorBoard(workdir, resume_step)
        else:
            from milora_jax.training.weights_and_biases import WeightsAndBiases

            self._trackers[name] = WeightsAndBiases(workdir, config, self._file.last_step, self._say)

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # whatever it is, it is not worth a training run
            self._trackers.pop(name, None)
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            self._say(f"train.trackers: {name} is given up, metrics.jsonl goes on: {reason}")


def require_installed(trackers: str) -> None:
    """Refuse a tracker whose package is missing, before a run begins.

    Args:
      trackers: as ``train.trackers``.

    Raises:
      UserError: naming the extra that installs it.
    """
    for name in tracker_names(trackers):
        package = PACKAGES[name]
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"train.trackers {name!r} needs the package {package}: pip install 'milora-jax[{name}]'"
            )


def scalars(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The figures that are shown as curves, under the names they are shown by.

    Of shares per layer and expert it is each expert's mean over layers.
    """
    for name, value in metrics.items():
        if value is None:
            continue
        if name in SHARES:
            means = np.mean(value, axis=0).tolist()
            yield from ((f"{SHARES[name]}/{e}", mean) for e, mean in zip(EXPERTS, means, strict=True))
        else:
            yield TAGS.get(name, name), float(np.mean(value))


def pictures(metrics: Mapping[str, Any]) -> Iterator[tuple[str, UInt[np.ndarray, "height width 3"]]]:
    """The shares per layer and expert as heat maps, under the names they are shown by."""
    for name, tag in SHARES.items():
        if metrics.get(name) is not None:
            yield tag, heat_map(np.asarray(metrics[name], np.float32))


def heat_map(share: Float[np.ndarray, "L E"]) -> UInt[np.ndarray, "height width 3"]:
    """Shares from 0 (dark) to 1 (bright), layers from the bottom up, in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = len(share)
    figure = Figure(figsize=(4.2, max(2.2, 0.2 * layers + 1.0)), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(share, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto", origin="lower")
    axes.set_xticks(range(len(EXPERTS)), LETTERS)
    axes.set_yticks(range(0, layers, max(1, -(-layers // 8))))
    axes.set(xlabel="expert", ylabel="layer")
    figure.colorbar(image, ax=axes, label="share of dev prompts")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
