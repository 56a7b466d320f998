"""The last lines of a run: the paths of its files, and commands that use them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from milora_jax.adapters.registry import build_method
from milora_jax.base.families import FAMILIES
from milora_jax.config import Config, tracker_names
from milora_jax.errors import as_given
from milora_jax.model_config import ModelConfig
from milora_jax.storage.export import formats_of


def next_steps(workdir: Path, config: Config, model: ModelConfig, written: Sequence[str]) -> list[str]:
    """The paths of what a finished run has written, and the commands that use it.

    Args:
      model: the run's model.
      written: names of files in the workdir, besides the adapter.
    """
    here, path = Path.cwd(), config.model.path
    if Path(path).is_relative_to(here):
        path = str(Path(path).relative_to(here))
    place, base = shlex.quote(as_given(workdir)), shlex.quote(path)
    out = "export" if place.startswith("gs:") else f"{place}/export"  # exports are written to a disk
    scored = "--beams 3" if config.data.test else "--data FILE.jsonl"
    export_format = formats_of(build_method(config.adapter), FAMILIES[model.family].fused)[0]
    commands = [
        f'python -m milora_jax.generation --workdir {place} --prompt "..."',
        f"python -m milora_jax.evaluation --workdir {place} {scored}",
        f"python -m milora_jax.storage export --workdir {place} --out {out} --format {export_format}",
        f"python serve.py --base {base} --adapter mine={place}",
    ]
    if "tensorboard" in tracker_names(config.train.trackers):
        commands.append(f"tensorboard --logdir {place}")
    lines = [f"written to {as_given(workdir)}: {', '.join(['best/ (the adapter)', *written])}"]
    return lines + [f"{'next:' if not i else '':5} {command}" for i, command in enumerate(commands)]
