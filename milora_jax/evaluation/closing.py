"""The last lines of a run: where its files are, and what to type next."""

from __future__ import annotations

import shlex
from pathlib import Path

from milora_jax.config import Config, tracker_names

WRITTEN = "best/ (the adapter), summary.json, metrics.jsonl, routing_health.png"
SCORED = "predictions.jsonl, routing.png"


def closing_lines(workdir: Path, config: Config) -> list[str]:
    """Paths, and the commands that use what a finished run has written."""
    here, path = Path.cwd(), config.model.path
    if Path(path).is_relative_to(here):
        path = str(Path(path).relative_to(here))
    place, base = shlex.quote(str(workdir)), shlex.quote(path)
    scored = "--beams 3" if config.data.test else "--data FILE.jsonl"
    commands = [
        f'python -m milora_jax.generation --workdir {place} --prompt "..."',
        f"python -m milora_jax.evaluation --workdir {place} {scored}",
        f"python -m milora_jax.storage export --workdir {place} --out {place}/export --format milora",
        f"python serve.py --base {base} --adapter mine={place}",
    ]
    if "tensorboard" in tracker_names(config.train.trackers):
        commands.append(f"tensorboard --logdir {place}")
    files = f"{WRITTEN}, {SCORED}" if config.data.test else WRITTEN
    lines = [f"written to {workdir}: {files}"]
    return lines + [f"{'next:' if not i else '':5} {command}" for i, command in enumerate(commands)]
