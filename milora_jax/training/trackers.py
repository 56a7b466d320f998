"""Where the figures of a run are logged: ``metrics.jsonl``, and on request TensorBoard and Weights & Biases.

A tracker shows what ``metrics.jsonl`` holds and nothing else. A tracker that fails, because the network or
the disk is gone, is dropped with one line: training continues, and ``metrics.jsonl`` is complete.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from milora_jax.config import Config, tracker_names
from milora_jax.errors import UserError
from milora_jax.parallel.processes import is_first
from milora_jax.shapes import Float, UInt
from milora_jax.storage.files import read_json, write_json_atomic
from milora_jax.training.workdir import MetricsLog
from milora_jax.types import EXPERTS, LETTERS

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""The package of each tracker; the extra that installs it has the tracker's name."""

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
    "dev_loss": "dev/loss",
    "dev_answers": "dev/answers",
    **{
        f"{where}{name}": f"{shown}/{name}"
        for where, shown in (("", "train"), ("dev_", "dev"))
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "kl")
    },
}
"""Names under which the figures of ``metrics.jsonl`` are shown; values per layer are shown as a mean."""

SHARES = {"expert_share": "routing/expert_share", "expert_first": "routing/first_choice"}
"""Shares per layer and expert, shown as heat maps."""

TENSORBOARD_FOLDER = "tensorboard"
"""Folder of a workdir with the event files, for ``tensorboard --logdir WORKDIR``."""

WANDB_ID_FILE = "wandb.json"
"""File of a workdir with the id under which Weights & Biases continues a resumed run."""

WANDB_PROJECT = "milora_jax"
"""The project of runs whose environment sets no ``WANDB_PROJECT``."""

WANDB_SECONDS = 30
"""Seconds that the service, and a person who must log in, have to respond when a run begins."""


class Tracker(Protocol):
    """A service or a file format that shows the figures of a run."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log the figures of a step, under the names of ``metrics.jsonl``."""
        ...

    def close(self) -> None:
        """Flush everything; nothing is logged afterwards."""
        ...


class TensorBoard:
    """Writes event files. Each start of a run writes one; TensorBoard reads all of them as one run."""

    def __init__(self, workdir: Path, resume_step: int) -> None:
        """Begin an event file.

        Args:
          resume_step: TensorBoard discards the figures of later steps in earlier files.
        """
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

        self._writer = SummaryWriter(
            str(workdir / TENSORBOARD_FOLDER),
            purge_step=resume_step + 1,
            # Two starts within one second would otherwise write to the same name.
            filename_suffix=f".{resume_step}",
        )

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the curves and heat maps of a step to the file."""
        for tag, value in scalars(metrics):
            self._writer.add_scalar(tag, value, step)
        for tag, picture in pictures(metrics):
            self._writer.add_image(tag, picture, step, dataformats="HWC")
        # A run that is killed does not log again what it logged before its checkpoint.
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class WeightsAndBiases:
    """Sends figures to Weights & Biases, or writes them to ``WORKDIR/wandb`` under ``WANDB_MODE=offline``.

    A run keeps one id when it is resumed; the workdir holds it.
    """

    def __init__(self, workdir: Path, config: Config, logged: int, log: Callable[[str], None]) -> None:
        """Begin or continue the run.

        Args:
          logged: the last step that was logged before a resume; the service discards nothing, so steps up to
            this one are not sent twice.
          log: receives one line with the address of the run.
        """
        import wandb  # pyright: ignore[reportMissingImports]

        id_path = workdir / WANDB_ID_FILE
        if not id_path.is_file():
            write_json_atomic(id_path, {"id": secrets.token_hex(4)})
        self._logged, self._picture = logged, wandb.Image
        self._run = wandb.init(
            id=str(read_json(id_path)["id"]),
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", WANDB_PROJECT),
            name=workdir.name,
            dir=str(workdir),
            config=config.to_dict(),
            settings=wandb.Settings(
                silent=True, console="off", init_timeout=WANDB_SECONDS, login_timeout=WANDB_SECONDS
            ),
        )
        later = f"wandb sync {workdir / 'wandb'}/offline-run-* sends it"
        log(f"Weights & Biases: {later if self._run.offline else self._run.url}")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send the curves and heat maps of a step."""
        if step > self._logged:
            shown = {tag: self._picture(picture) for tag, picture in pictures(metrics)}
            self._run.log({**dict(scalars(metrics)), **shown}, step=step)

    def close(self) -> None:
        """Send what has not been sent yet."""
        self._run.finish()


class RunLog:
    """A run's log: the file, and the trackers of the config, which only the first process opens."""

    def __init__(self, workdir: Path, config: Config, resume_step: int, log: Callable[[str], None]) -> None:
        """Open the log.

        Args:
          resume_step: the step from which training resumes; figures of later steps are discarded.
          log: receives one line when a tracker is dropped.
        """
        self._log = log
        self._file = MetricsLog(workdir, resume_step, log)
        self._trackers: dict[str, Tracker] = {}
        for name in tracker_names(config.train.trackers) if is_first() else ():
            self._try(name, lambda name=name: self._open(name, workdir, config, resume_step))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write a line to the file, and log to every tracker that still works."""
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
            self._trackers[name] = TensorBoard(workdir, resume_step)
        else:
            self._trackers[name] = WeightsAndBiases(workdir, config, self._file.last_step, self._log)

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # no failure of a tracker may end a training run
            self._trackers.pop(name, None)
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            self._log(f"train.trackers: {name} is given up, metrics.jsonl goes on: {reason}")


def require_installed(trackers: str) -> None:
    """Refuse a tracker whose package is missing, before a run begins.

    Args:
      trackers: as ``train.trackers``.

    Raises:
      UserError: a package is missing; the error names the extra that installs it.
    """
    for name in tracker_names(trackers):
        package = PACKAGES[name]
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"train.trackers {name!r} needs the package {package}: pip install 'milora-jax[{name}]'"
            )


def scalars(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The figures that are shown as curves, with their tags.

    Shares per layer and expert become one curve per expert, the mean over layers.
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
    """The shares per layer and expert as heat maps, with their tags."""
    for name, tag in SHARES.items():
        if metrics.get(name) is not None:
            yield tag, heat_map(np.asarray(metrics[name], np.float32))


def heat_map(share: Float[np.ndarray, "L E"]) -> UInt[np.ndarray, "height width 3"]:
    """An RGB image of shares from 0 (dark) to 1 (bright), layers from the bottom up."""
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
