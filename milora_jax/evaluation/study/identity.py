"""What decides the results of a study: its settings, and its base and rows by their content.

A study may take weeks, and the package gains settings meanwhile. The default of a new setting leaves all
results as they were, so a setting at its default neither renames a cell nor makes a study another one.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from milora_jax.adapters.registry import build_method, full_settings
from milora_jax.base.fingerprint import base_fingerprint
from milora_jax.base.source import model_directory
from milora_jax.config import AdapterSection, Config
from milora_jax.data.records import fingerprint, read_records
from milora_jax.data.sources import run_sources
from milora_jax.errors import UserError
from milora_jax.evaluation.study.settings import Budget, Converged, Study
from milora_jax.storage.files import read_json, write_json_atomic
from milora_jax.storage.lock import WorkdirBusy, WorkdirLock
from milora_jax.training.workdir import leaves_by_path

STUDY_NAME = "study.json"

Leaves = dict[tuple[str, ...], Any]
"""Settings by the path of each; see :func:`leaves_by_path`."""


def changed_settings(config: Config) -> dict[str, Any]:
    """The settings of a run that differ from the defaults, by dotted name, without paths of base and rows."""
    full = dataclasses.replace(config, adapter=full_settings(build_method(config.adapter)))
    defaults = leaves_by_path(_run_values(Config(adapter=_defaults_of_method(config.adapter.method))))
    found = leaves_by_path(_run_values(full))
    return {".".join(name): value for name, value in found.items() if value != defaults[name]}


def claim_study(directory: Path, study: Study) -> None:
    """Write ``study.json``, or check that an old one describes this study.

    Raises:
      UserError: a setting differs; the error names the first one, and no file is changed.
    """
    path, new, defaults = directory / STUDY_NAME, _identity(study), _leaves(_default_identity(study))
    with study_lock(directory):
        if not path.is_file():
            write_json_atomic(path, new)
            return
        old_leaves, new_leaves = leaves_by_path(read_json(path)), _leaves(new)
        for name in sorted({*old_leaves, *new_leaves}):
            old, now = (leaves.get(name, defaults.get(name)) for leaves in (old_leaves, new_leaves))
            if old != now:
                raise UserError(
                    f"{str(directory)!r} holds a study of another config: {'.'.join(name)} is {old!r} there "
                    f"and {now!r} now; use another --workdir (the finished cells are kept)"
                )


@contextmanager
def study_lock(directory: Path) -> Iterator[None]:
    """Lock a study's own files for a moment; several processes may run its cells."""
    while True:
        try:
            with WorkdirLock(directory):
                yield
                return
        except WorkdirBusy:
            time.sleep(0.1)


def _identity(study: Study) -> dict[str, Any]:
    """Everything that decides the results of the cells, with base and rows by their content."""
    rows = {
        split: fingerprint([record for source in sources for record in read_records(source, True)])
        for split, sources in run_sources(study.base.data).items()
    }
    methods = {
        label: dataclasses.asdict(full_settings(build_method(settings)))
        for label, settings in study.methods.items()
    }
    return {
        **dataclasses.asdict(study),
        "base": _run_values(study.base),
        "methods": methods,
        "tasks": study.tasks,
        "base_fingerprint": base_fingerprint(model_directory(study.base.model.path)),
        "rows_fingerprint": rows,
    }


def _default_identity(study: Study) -> dict[str, Any]:
    """The part of the identity of a study that has defaults, with all of them."""
    converged = {**_field_defaults(Converged), **dict.fromkeys(("single", "mixed"), _field_defaults(Budget))}
    return {
        **_field_defaults(Study),
        **({"converged": converged} if study.converged else {}),
        "base": _run_values(Config()),
        "methods": {
            label: dataclasses.asdict(_defaults_of_method(settings.method))
            for label, settings in study.methods.items()
        },
    }


def _run_values(config: Config) -> dict[str, Any]:
    """A config's values without the paths of its base and its rows."""
    values = config.to_dict()
    del values["model"]["path"]
    for split in ("train", "dev", "test"):
        del values["data"][split]
    return values


def _defaults_of_method(method: str) -> AdapterSection:
    return full_settings(build_method(AdapterSection(method=method)))


def _field_defaults(section: type) -> dict[str, Any]:
    fields = dataclasses.fields(section)
    return {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}


def _leaves(identity: dict[str, Any]) -> Leaves:
    """The leaves of an identity as they are read from a file: tuples have become lists."""
    return leaves_by_path(json.loads(json.dumps(identity)))
