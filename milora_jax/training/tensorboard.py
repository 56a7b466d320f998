"""A run's figures as event files in ``WORKDIR/tensorboard``, for ``tensorboard --logdir WORKDIR``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from milora_jax.training.trackers import pictures, scalars

FOLDER = "tensorboard"


class TensorBoard:
    """One life of a run writes one event file; TensorBoard reads those of all lives as one run."""

    def __init__(self, workdir: Path, resume_step: int) -> None:
        """Begin an event file.

        Args:
          resume_step: TensorBoard is told to forget what earlier files say of later steps.
        """
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

        self._writer = SummaryWriter(
            str(workdir / FOLDER),
            purge_step=resume_step + 1,
            # Two lives that begin in one second would have one name.
            filename_suffix=f".{resume_step}",
        )

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write curves and pictures of a step to the file."""
        for tag, value in scalars(metrics):
            self._writer.add_scalar(tag, value, step)
        for tag, picture in pictures(metrics):
            self._writer.add_image(tag, picture, step, dataformats="HWC")
        # What a killed run has logged up to its checkpoint is not logged again.
        self._writer.flush()

    def close(self) -> None:
        """End the file."""
        self._writer.close()
