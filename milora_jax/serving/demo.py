"""Trains two adapters of the embedded model, unless an earlier demonstration has left them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from milora_jax.errors import UserError
from milora_jax.storage.adapters import best_metadata
from milora_jax.tiny import TASKS_DIR

DEMO_TASKS = ("arithmetic", "word_order")

ROOT = Path(__file__).resolve().parents[2]

STEPS = 200
"""Optimizer steps after which the two differ clearly: about a minute each on two cores."""


def demo_adapters(root: Path) -> dict[str, Path]:
    """Return workdirs under ``root`` by task, each trained by ``configs/tiny.py`` on that task alone.

    Raises:
      UserError: training failed.
    """
    found = {task: root / f"demo_{task}" for task in DEMO_TASKS}
    for task, workdir in found.items():
        try:
            best_metadata(workdir)
        except UserError:
            _train(task, workdir)
    return found


def _train(task: str, workdir: Path) -> None:
    print(f"training the adapter {task!r} in {workdir}", file=sys.stderr, flush=True)
    folder = TASKS_DIR / task
    data = [f"--config.data.{split}={task}={folder / split}.jsonl" for split in ("train", "dev", "test")]
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        f"--config={ROOT / 'configs' / 'tiny.py'}",
        f"--workdir={workdir}",
        f"--config.train.max_steps={STEPS}",
        f"--config.train.eval_every={STEPS // 2}",
        f"--config.train.save_every={STEPS // 2}",
        "--config.eval.limit=20",
        *data,
    ]
    # Its report on standard output is not this command's; errors and progress are on standard error.
    if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
        raise UserError(f"the adapter {task!r} could not be trained, see above")
