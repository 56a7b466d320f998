"""The registry of adapters: their names, directories, and whether they are loaded. It survives a restart.

Its file is one JSON object, which is replaced as a whole at every change::

    {"adapters": {"math": {"path": "runs/math", "loaded": true, "pinned": false}}}

Operators write it, or start a server with ``--adapter NAME=DIR``. A client names adapters, never paths.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milora_jax.base.json_files import read_json_object
from milora_jax.errors import UserError
from milora_jax.serving.keys import NAME
from milora_jax.storage.files import write_json_atomic


@dataclass(frozen=True)
class Registered:
    """An adapter that a server may load.

    Attributes:
      path: its directory: a workdir, a copy of its ``best`` folder, or an export.
      loaded: whether a server loads it at the start.
      pinned: whether it is never evicted from the device.
    """

    path: Path
    loaded: bool = True
    pinned: bool = False


class Registry:
    """The adapters by name.

    Args:
      path: of the file; None to keep nothing.
      given: adapters of the command line, which are added to those of the file or replace them.
    """

    def __init__(self, path: Path | None, given: Mapping[str, Registered]) -> None:
        self._path, self._lock = path, threading.Lock()
        stored = _read(path) if path is not None and path.exists() else {}
        self._adapters = {**stored, **given}
        self._write()

    def get(self, name: str) -> Registered | None:
        """The adapter that is registered under a name."""
        return self._adapters.get(name)

    def to_load(self) -> dict[str, Registered]:
        """The adapters that a server loads at the start."""
        return {name: each for name, each in self._adapters.items() if each.loaded}

    def note(self, name: str, loaded: bool) -> None:
        """Record that an adapter was loaded or unloaded."""
        with self._lock:
            self._adapters[name] = dataclasses.replace(self._adapters[name], loaded=loaded)
            self._write()

    def _write(self) -> None:
        if self._path is not None:
            adapters = {
                name: {"path": str(each.path), "loaded": each.loaded, "pinned": each.pinned}
                for name, each in sorted(self._adapters.items())
            }
            write_json_atomic(self._path, {"adapters": adapters})


def _read(path: Path) -> dict[str, Registered]:
    adapters = read_json_object(path).get("adapters")
    if not isinstance(adapters, dict):
        raise UserError(f"{path}: expected an object 'adapters'")
    return {name: _registered(name, values, str(path)) for name, values in adapters.items()}


def _registered(name: str, values: Any, where: str) -> Registered:
    if not NAME.fullmatch(name):
        raise UserError(f"{where}: adapter name {name!r}: expected letters, digits, '.', '_', '-'")
    if not isinstance(values, dict) or not isinstance(values.get("path"), str):
        raise UserError(f"{where}: adapter {name!r} has no path")
    unknown = sorted(values.keys() - {"path", "loaded", "pinned"})
    if unknown:
        raise UserError(
            f"{where}: adapter {name!r} has a field {unknown[0]!r}: expected path, loaded, pinned"
        )
    flags = {field: values.get(field, default) for field, default in (("loaded", True), ("pinned", False))}
    for field, value in flags.items():
        if not isinstance(value, bool):
            raise UserError(f"{where}: adapter {name!r}: {field} is {value!r}: expected true or false")
    return Registered(Path(values["path"]), **flags)
