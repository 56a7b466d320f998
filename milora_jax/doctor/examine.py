"""The doctor's examination of a config, of a workdir, or of the machine alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from milora_jax.config import Config
from milora_jax.doctor.findings import FAIL, OK, WARN, Finding, guarded
from milora_jax.doctor.versions import installed_versions, needed_by, requirements, version_findings


def examine(read_config: Callable[[], Config] | None, workdir: Path | None) -> Iterator[Finding]:
    """Make every check and yield its findings.

    Args:
      read_config: reads the settings of a planned run; None if there is none.
      workdir: workdir of a run; without ``read_config`` its own settings are checked.
    """
    settings: dict[str, Config] = {}
    if read_config is not None:
        yield from guarded("config", lambda: _settings("config", settings, read_config))
    if read_config is not None and workdir is not None and _is_new(workdir):
        yield Finding(OK, "workdir", f"{str(workdir)!r} is new: train.py begins there")
        workdir = None
    if workdir is not None:
        yield from guarded("workdir", lambda: _settings("workdir", settings, lambda: kept_config(workdir)))
    given, kept = settings.get("config"), settings.get("workdir")
    config = kept if read_config is None else given
    yield from guarded("versions", lambda: _versions(config))
    try:
        # It imports JAX and Flax, which may be what is broken.
        from milora_jax.doctor.checks import look_at
        from milora_jax.doctor.subject import Subject
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        yield Finding(FAIL, "import", f"{said}; nothing else was looked at, mend the installation first")
        return
    yield from look_at(Subject(given, kept, workdir), has_settings=config is not None)


def _versions(config: Config | None) -> Iterator[Finding]:
    required = requirements()
    installed = installed_versions({**required, **needed_by(config)})
    return version_findings(config, required, installed, sys.version_info[:2])


def _is_new(workdir: Path) -> bool:
    return not workdir.exists() or (workdir.is_dir() and not any(workdir.iterdir()))


def kept_config(workdir: Path) -> Config:
    """Read the settings of the run in a workdir."""
    from milora_jax.storage.workdir import read_workdir_config

    return read_workdir_config(workdir)


def _settings(name: str, found: dict[str, Config], read: Callable[[], Config]) -> Iterator[Finding]:
    """Read settings into ``found`` and report method and base."""
    config = found[name] = read()
    said = f"{config.adapter.method} on {config.model.path or 'no base'}"
    yield Finding(OK if config.model.path else WARN, name, said)
