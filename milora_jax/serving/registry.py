"""The registry of adapters: their names, directories, and whether they are loaded. It survives a restart.

Its file is one JSON object, which is replaced as a whole at every change::

    {"adapters": {"math": {"path": "runs/math", "loaded": true, "pinned": false}}}

Operators write it, or start a server with ``--adapter NAME=DIR``. A client names adapters, never paths.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from pathlib import Path

from pydantic.dataclasses import dataclass

from milora_jax.serving.json_models import FileModel, Name, read_model
from milora_jax.storage.files import write_json_atomic


@dataclass(frozen=True, config=FileModel.model_config)
class Registered:
    """An adapter that a server may load.

    Attributes:
      path: its directory: a workdir, a copy of its ``best`` folder, an export, or what PEFT saved; or its
        address ``gs://BUCKET/PATH`` or ``hf://OWNER/NAME``.
      loaded: whether a server loads it at the start.
      pinned: whether it is never evicted from the device.
    """

    path: Path
    loaded: bool = True
    pinned: bool = False


class RegistryFile(FileModel):
    """The file of a registry."""

    adapters: dict[Name, Registered]


class Registry:
    """The adapters by name.

    Args:
      path: path of the file; None to store nothing.
      given: adapters of the command line, which are added to those of the file or replace them.
    """

    def __init__(self, path: Path | None, given: Mapping[str, Registered]) -> None:
        self._path, self._lock = path, threading.Lock()
        stored = read_model(path, RegistryFile).adapters if path is not None and path.exists() else {}
        self._adapters = {**stored, **given}
        self._write()

    def get(self, name: str) -> Registered | None:
        """Return the adapter that is registered under a name."""
        return self._adapters.get(name)

    def to_load(self) -> dict[str, Registered]:
        """Return the adapters that a server loads at the start."""
        return {name: each for name, each in self._adapters.items() if each.loaded}

    def note(self, name: str, loaded: bool) -> None:
        """Record that an adapter was loaded or unloaded."""
        with self._lock:
            self._adapters[name] = dataclasses.replace(self._adapters[name], loaded=loaded)
            self._write()

    def _write(self) -> None:
        if self._path is not None:
            file = RegistryFile(adapters=dict(sorted(self._adapters.items())))
            write_json_atomic(self._path, file.model_dump(mode="json"))
