"""``python -m milora_jax doctor``: one line per check, and an exit code that says whether any failed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from milora_jax.cli import Parser
from milora_jax.config import Config
from milora_jax.doctor.findings import FAIL, OK, WARN, Finding, guarded
from milora_jax.doctor.versions import installed_versions, needed_by, requirements, version_findings
from milora_jax.errors import UserError
from milora_jax.train_flags import read_config_file


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what of it overrides the config."""
    parser = Parser(
        allow_abbrev=False,
        prog="python -m milora_jax doctor",
        description="Look at a machine, a config with its data, and a workdir: one line per check.",
    )
    parser.add_argument("--config", default="", help="a file such as configs/tiny.py")
    parser.add_argument("--workdir", type=Path, help="of train.py; without --config its own settings count")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--config.GROUP.FIELD", metavar="VALUE", help="as for train.py")
    asked, overrides = parser.parse_known_args(arguments)
    if overrides and not asked.config:
        raise UserError(f"command line: {overrides[0]!r} changes a --config, and none is given")
    return asked, overrides


def main(arguments: list[str]) -> None:
    """Make every check and print what it found.

    Raises:
      UserError: a check has failed.
    """
    asked, overrides = parse(arguments)
    found = []
    for finding in examine(asked.config, overrides, asked.workdir):
        found.append(finding)
        if not asked.json:
            print(finding.line(), flush=True)
    failed = sum(finding.level == FAIL for finding in found)
    if asked.json:
        report = {"ok": failed == 0, "findings": [finding.to_json() for finding in found]}
        print(json.dumps(report, ensure_ascii=False))
    if failed:
        raise UserError(f"{failed} of {len(found)} findings are failures")


def examine(path: str, overrides: list[str], workdir: Path | None) -> Iterator[Finding]:
    """All findings, as they come.

    Args:
      path: of a config file; empty for none.
    """
    settings: dict[str, Config] = {}
    if path:
        yield from guarded(
            "config", lambda: _settings("config", settings, lambda: read_config_file(path, overrides))
        )
    if path and workdir is not None and _is_new(workdir):
        yield Finding(OK, "workdir", f"{str(workdir)!r} is new: train.py begins there")
        workdir = None
    if workdir is not None:
        yield from guarded("workdir", lambda: _settings("workdir", settings, lambda: kept_config(workdir)))
    given, kept = settings.get("config"), settings.get("workdir")
    config = given if path else kept
    yield from guarded("versions", lambda: _versions(config))
    try:
        # Hangs on JAX and Flax, which may be what is broken.
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
    """The settings of the run in a workdir."""
    from milora_jax.storage.workdir import read_workdir_config

    return read_workdir_config(workdir)


def _settings(name: str, found: dict[str, Config], read: Callable[[], Config]) -> Iterator[Finding]:
    """Read settings into ``found`` and say what they are of."""
    config = found[name] = read()
    said = f"{config.adapter.method} on {config.model.path or 'no base'}"
    yield Finding(OK if config.model.path else WARN, name, said)
