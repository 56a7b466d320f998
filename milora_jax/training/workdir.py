"""The workdir of a run: its config, its metrics, and the lock of its writer."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from milora_jax.adapters.registry import before_features
from milora_jax.config import Config
from milora_jax.errors import UserError
from milora_jax.parallel.processes import is_first, wait_for_all
from milora_jax.storage.files import read_json, write_json_atomic
from milora_jax.storage.lock import WorkdirLock
from milora_jax.storage.workdir import CONFIG_NAME, read_workdir_config

METRICS_NAME = "metrics.jsonl"
CHANGEABLE = {
    ("eval",),
    ("mesh",),
    ("data", "test"),
    ("data", "prepared_path"),
    *(
        ("train", name)
        for name in ("log_every", "save_every", "accumulate", "remat", "loss_chunk", "trackers")
    ),
}
"""Settings that may differ when a run is resumed: they do not affect the trained parameters, except by the
order of sums."""


OF_DEV_ANSWERS = (("eval", "limit"), ("eval", "max_new_tokens"), ("eval", "metric"))
"""Settings that may not differ where answers to the dev rows choose the best step."""


def claim_workdir(workdir: Path, config: Config) -> None:
    """Write ``config.json`` into a new workdir, or check that a used one belongs to this config.

    Raises:
      UserError: a setting differs from the run of the workdir; the error names the first one.
    """
    _require_same(workdir, config)
    write_json_atomic(workdir / CONFIG_NAME, config.to_dict())


@contextmanager
def claimed(workdir: Path, config: Config) -> Iterator[None]:
    """Lock a workdir for the ``with`` block: the first process locks it, the others wait for that.

    Raises:
      UserError: see :class:`WorkdirLock` and :func:`claim_workdir`.
    """
    if not is_first():
        wait_for_all("workdir claimed")
        yield
        return
    with WorkdirLock(workdir):
        claim_workdir(workdir, config)
        wait_for_all("workdir claimed")
        yield


def continued(config: Config, workdir: Path | None, log: Callable[[str], None]) -> Config:
    """Complete a config by what its workdir has decided already.

    The time of the chat template stays that of the run's beginning. A run from before ``data.special_tokens``
    was a setting keeps the rule of its prompts, and one from before ``adapter.features`` was a setting keeps
    its router, whatever the defaults are now.
    """
    if workdir is None or not (workdir / CONFIG_NAME).is_file():
        return config
    kept, given = read_workdir_config(workdir).data, config.data
    changes = {} if given.template_time else {"template_time": kept.template_time}
    stored = read_json(workdir / CONFIG_NAME)
    if before_features(stored.get("adapter", {})):
        its_own = vars(read_workdir_config(workdir).adapter)
        left_open = {name: its_own[name] for name, value in vars(config.adapter).items() if value is None}
        config = dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, **left_open))
    unstored = "special_tokens" not in stored.get("data", {})
    if unstored and kept.special_tokens != given.special_tokens:
        changes["special_tokens"] = kept.special_tokens
        log(f"the run in {workdir} began with data.special_tokens={kept.special_tokens}, which is kept")
    return dataclasses.replace(config, data=dataclasses.replace(given, **changes))


def refuse_early(workdir: Path, config: Config) -> None:
    """Refuse a workdir of another run before a large base is loaded.

    Raises:
      UserError: see :class:`WorkdirLock` and :func:`claim_workdir`.
    """
    if is_first() and (workdir / CONFIG_NAME).is_file():
        with WorkdirLock(workdir):
            _require_same(workdir, config)


def _require_same(workdir: Path, config: Config) -> None:
    if (workdir / CONFIG_NAME).is_file():
        for name, old, new in differences(read_workdir_config(workdir), config):
            raise UserError(
                f"workdir {str(workdir)!r} holds another run: {name} is {old!r} there "
                f"and {new!r} now; use another --workdir"
            )


def differences(kept: Config, given: Config) -> Iterator[tuple[str, Any, Any]]:
    """The settings that differ but must not differ when a run is resumed.

    Args:
      kept, given: configs of the workdir and of now, with every setting of the method written out.

    Yields:
      Name, value in the workdir, value now.
    """
    old = leaves_by_path(kept.to_dict())
    fixed = OF_DEV_ANSWERS if given.train.best_by != "loss" else ()
    for name, value in leaves_by_path(given.to_dict()).items():
        changeable = (name[:1] in CHANGEABLE or name in CHANGEABLE) and name not in fixed
        if not changeable and old[name] != value:
            yield ".".join(name), old[name], value


class MetricsLog:
    """``metrics.jsonl``: one JSON object a line, in step order even after a resume.

    Attributes:
      last_step: the last step that an earlier start of the run has logged; 0 if there is none.
    """

    def __init__(self, workdir: Path, resume_step: int, warn: Callable[[str], None]) -> None:
        """Open the log and drop the lines of steps that will be taken again.

        Only the first process writes; the logs of the others are discarded.

        Args:
          warn: receives one line if a power cut left unreadable lines, which are dropped too.
        """
        self._path = workdir / METRICS_NAME
        self.last_step = 0
        if not is_first():
            return
        lines = self._old_lines()
        steps = [_step_of(line) for line in lines]
        self.last_step = max((step for step in steps if step is not None), default=0)
        if None in steps:
            warn(f"{self._path}: {steps.count(None)} unreadable line(s) dropped")
        kept = [
            line for line, step in zip(lines, steps, strict=True) if step is not None and step <= resume_step
        ]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self._path)

    def _old_lines(self) -> list[str]:
        """Complete lines of an earlier start; a kill may have torn the last one."""
        if not self._path.is_file():
            return []
        text = self._path.read_text(encoding="utf-8", errors="replace")
        return text[: text.rfind("\n") + 1].splitlines()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one line; values that are not finite are written as null, which JSON has."""
        if not is_first():
            return
        clean = {name: _json_value(value) for name, value in values.items()}
        line = json.dumps({"step": step, **clean}, allow_nan=False)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def leaves_by_path(values: dict[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Flatten nested dictionaries into one, keyed by the path of each value."""
    leaves: dict[tuple[str, ...], Any] = {}
    for name, value in values.items():
        inner = leaves_by_path(value, (*path, name)) if isinstance(value, dict) else {(*path, name): value}
        leaves.update(inner)
    return leaves
