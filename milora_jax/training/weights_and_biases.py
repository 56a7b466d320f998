"""A run's figures at Weights & Biases, or in ``WORKDIR/wandb`` under ``WANDB_MODE=offline``."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from milora_jax.config import Config
from milora_jax.storage.files import read_json, write_json_atomic
from milora_jax.training.trackers import pictures, scalars

ID_FILE = "wandb.json"
PROJECT = "milora_jax"
"""Of runs whose environment names no ``WANDB_PROJECT``."""

PATIENCE = 30
"""Seconds in which the service must answer, and a person log in, when a run begins."""


class WeightsAndBiases:
    """A run under one id for all its lives, which the workdir keeps."""

    def __init__(self, workdir: Path, config: Config, logged: int, say: Callable[[str], None]) -> None:
        """Begin or continue the run.

        Args:
          logged: the last step that earlier lives have logged; the service takes nothing back, so that steps
            up to this one are not told twice.
          say: receives one line that says where the run is.
        """
        import wandb  # pyright: ignore[reportMissingImports]

        self._logged, self._picture = logged, wandb.Image
        self._run = wandb.init(
            id=_run_id(workdir),
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=workdir.name,
            dir=str(workdir),
            config=config.to_dict(),
            settings=wandb.Settings(
                silent=True, console="off", init_timeout=PATIENCE, login_timeout=PATIENCE
            ),
        )
        later = f"wandb sync {workdir / 'wandb'}/offline-run-* sends it"
        say(f"Weights & Biases: {later if self._run.offline else self._run.url}")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Tell curves and pictures of a step."""
        if step > self._logged:
            shown = {tag: self._picture(picture) for tag, picture in pictures(metrics)}
            self._run.log({**dict(scalars(metrics)), **shown}, step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def _run_id(workdir: Path) -> str:
    """The id of the workdir's run; a new one the first time."""
    path = workdir / ID_FILE
    if not path.is_file():
        write_json_atomic(path, {"id": secrets.token_hex(4)})
    return str(read_json(path)["id"])
