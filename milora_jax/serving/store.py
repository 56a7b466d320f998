"""The adapters of a server: on disk, in host memory, and some of them in the slots of the device's bank.

An :class:`AdapterVersion` is counted by the requests that use it, so that one that is unloaded or replaced is
kept until the last of its requests is done. Adapters are read and checked in other threads; the device loop
alone writes the slots of the bank, between two of its steps.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from milora_jax.adapters.protocol import Adapter
from milora_jax.base.fingerprint import base_fingerprint
from milora_jax.base.modules import Base
from milora_jax.errors import UserError
from milora_jax.generation.bank import Bank, RankError, no_log, rank_of
from milora_jax.model_config import ModelConfig
from milora_jax.prompt_format import PromptFormat
from milora_jax.serving.json_models import NAME
from milora_jax.storage.imported import read_any_adapter
from milora_jax.types import PyTree

BASE_SLOT = 0
"""The adapter slot of requests for the base alone."""


@dataclass(eq=False)
class AdapterVersion:
    """One version of an adapter.

    Attributes:
      version: a digest of the contents.
      prompt_format: how prompts are written for it.
      prepared: its leaves as a slot of the bank holds them, in host memory; None while they are on disk only.
      slot: its adapter slot; None while it is not on the device.
      users: requests that hold it, queued ones included; it is kept for them.
      running: requests that decode with it; its slot is kept for them.
      pinned: whether it is never evicted from the device.
      draining: whether it was unloaded or replaced, and takes no new requests.
      last_used: when it was last acquired, as a running number.
      failed: why it could not be read again; empty if it could.
      reading: whether it is being read again.
    """

    name: str
    directory: Path
    version: str
    prompt_format: PromptFormat
    prepared: PyTree | None
    pinned: bool = False
    slot: int | None = None
    users: int = 0
    running: int = 0
    draining: bool = False
    last_used: int = 0
    failed: str = ""
    reading: bool = field(default=False, repr=False)


@dataclass(frozen=True)
class Model:
    """The base of a server.

    Attributes:
      base: in the decode layout.
      directory: directory of its files, for the fingerprint.
      quantize: its quantization; an adapter that was trained on another one is refused.
    """

    base: Base
    config: ModelConfig
    directory: Path
    quantize: str


class AdapterStore:
    """The adapters of a server by name.

    Args:
      first: adapters to load at the start, at least one; its method is that of all.
      slots: adapters on the device at the same time.
      host: adapters in host memory; others are read again from their directories when they are needed.
      reader: runs what reads from the disk.
      rank: highest rank of adapters that are loaded later, if it is above that of ``first``.
      log: see ``generation.bank.Bank``.
    """

    def __init__(
        self,
        model: Model,
        first: Mapping[str, Path],
        slots: int,
        reader: Executor,
        *,
        host: int = 64,
        rank: int = 0,
        pinned: frozenset[str] = frozenset(),
        log: Callable[[str], None] = no_log,
    ) -> None:
        self._model, self._reader, self._host = model, reader, max(host, slots)
        self._fingerprint = base_fingerprint(model.directory)
        self._lock = threading.Lock()
        self._clock = itertools.count(1)
        self._adapters: dict[str, AdapterVersion] = {}
        # The first slot is never written: pairs of zeros change nothing, so it is the base alone.
        no_adapter = AdapterVersion("", Path(), "", PromptFormat(), None, pinned=True, slot=BASE_SLOT)
        self._slots: list[AdapterVersion | None] = [no_adapter, *[None] * slots]
        read = {name: self._read(name, path) for name, path in first.items()}
        ranks = [rank_of(model.base, model.config, loaded, name) for name, loaded in read.items()]
        like = next(iter(read.values()))
        highest, places = max(rank, *ranks), len(self._slots)
        self.bank = Bank(model.base, model.config, like, places, rank=highest, log=log)
        for name, loaded in read.items():
            self._add(name, first[name], loaded, name in pinned)
        # Fill the device at the start, which compiles the program that writes a slot.
        for adapter in sorted(self._adapters.values(), key=lambda adapter: not adapter.pinned)[:slots]:
            self.acquire_slot(adapter)
            self.release_slot(adapter)

    @property
    def has_base(self) -> bool:
        """Whether the base alone can be served: the pairs of zeros in its slot change nothing."""
        return self.bank.adapters.method.is_pairs

    def names(self) -> list[str]:
        """Return the names of the adapters that new requests may use."""
        with self._lock:
            return sorted(self._adapters)

    def versions(self) -> list[AdapterVersion]:
        """Return the newest version of each adapter."""
        with self._lock:
            return list(self._adapters.values())

    def acquire(self, name: str) -> AdapterVersion | None:
        """Return the newest version of an adapter, for one more user; None if there is no such adapter."""
        with self._lock:
            adapter = self._adapters.get(name)
            if adapter is not None:
                adapter.users += 1
                adapter.last_used = next(self._clock)
            return adapter

    def retain(self, adapter: AdapterVersion) -> None:
        """Count one more user of a version that the caller holds."""
        with self._lock:
            adapter.users += 1

    def release(self, adapter: AdapterVersion) -> None:
        """Count one user less."""
        with self._lock:
            adapter.users -= 1
            if not adapter.users:
                adapter.failed = ""  # the next user reads it again: a disk can come back
            self._drop_if_unused(adapter)

    def load(self, name: str, directory: Path, pinned: bool = False) -> AdapterVersion:
        """Read an adapter, check it, and load it; running requests keep an older version of the same name.

        Blocks while it reads, so the device loop must not call it.

        Raises:
          UserError: for a bad name, a damaged or hostile directory, an adapter of another base or method, or
            of too high a rank; what was loaded before stays loaded.
        """
        return self._add(name, directory, self._read(name, directory), pinned)

    def unload(self, name: str) -> bool:
        """Unload an adapter; return False if no adapter of that name is loaded."""
        with self._lock:
            adapter = self._adapters.pop(name, None)
            if adapter is None:
                return False
            adapter.draining = True
            self._drop_if_unused(adapter)
            return True

    def slot_available(self, adapter: AdapterVersion, wake: Callable[[], None]) -> bool:
        """Whether an adapter is or can be on the device now; if it must be read first, start reading it.

        Args:
          wake: called from another thread when it has been read, or could not be.
        """
        with self._lock:
            if adapter.slot is not None or adapter.failed:
                return True
            if adapter.prepared is None:
                if not adapter.reading:
                    adapter.reading = True
                    self._reader.submit(self._read_again, adapter, wake)
                return False
            return self._free_slot() is not None

    def acquire_slot(self, adapter: AdapterVersion) -> int:
        """Return the slot of an adapter for one more running request, where :meth:`slot_available`.

        Writes the adapter to the device if it is not there. The device loop alone calls this and
        :meth:`release_slot`.
        """
        with self._lock:
            if adapter.slot is not None:
                adapter.running += 1
                return adapter.slot
            slot = self._free_slot()
            if slot is None or adapter.prepared is None:
                raise RuntimeError("no slot is available for the adapter")
            before = self._slots[slot]
            if before is not None:
                before.slot = None
            self._slots[slot], adapter.slot = adapter, slot
            prepared = adapter.prepared
        try:
            self.bank.place(prepared, slot)
        except BaseException:
            with self._lock:
                self._slots[slot] = adapter.slot = None  # its contents are unknown
            raise
        with self._lock:
            adapter.running += 1
        return slot

    def release_slot(self, adapter: AdapterVersion) -> None:
        """Count one running request less."""
        with self._lock:
            adapter.running -= 1

    def on_device(self) -> list[str]:
        """Return the names of the adapters on the device."""
        with self._lock:
            return [adapter.name for adapter in self._slots[1:] if adapter is not None]

    def _read(self, name: str, directory: Path) -> Adapter:
        if not re.fullmatch(NAME, name):
            raise UserError(f"adapter name {name!r}: expected letters, digits, '.', '_', '-', at most 64")
        loaded, metadata = read_any_adapter(directory, self._model.directory, self._model.quantize)
        if metadata["base_fingerprint"] != self._fingerprint:
            raise UserError(f"adapter {name!r} was made on other files than those of the base that is served")
        kept = metadata.get("quantize", "none")
        if kept != self._model.quantize:
            raise UserError(
                f"adapter {name!r} was made on a base kept as {kept!r}: this one is kept as "
                f"{self._model.quantize!r}"
            )
        return loaded

    def _prepared(self, name: str, loaded: Adapter) -> PyTree:
        try:
            return jax.device_get(self.bank.prepare(name, loaded))
        except RankError as error:
            raise UserError(f"{error}; start the server with --max-lora-rank {error.rank}") from None

    def _add(self, name: str, directory: Path, loaded: Adapter, pinned: bool) -> AdapterVersion:
        prepared = self._prepared(name, loaded)
        adapter = AdapterVersion(name, directory, version_of(loaded), loaded.encoding, prepared, pinned)
        with self._lock:
            pins = sum(other.pinned for other in self._adapters.values() if other.name != name)
            if pinned and pins >= len(self._slots) - 2:
                raise UserError(
                    f"adapter {name!r} cannot be pinned: of --adapters-on-device {len(self._slots) - 1} one "
                    "must stay free for the others"
                )
            before = self._adapters.get(name)
            adapter.last_used = next(self._clock)
            self._adapters[name] = adapter
            if before is not None:
                before.draining = True
                self._drop_if_unused(before)
            self._evict_from_host()
        return adapter

    def _read_again(self, adapter: AdapterVersion, wake: Callable[[], None]) -> None:
        prepared, failed = None, ""
        try:
            loaded = self._read(adapter.name, adapter.directory)
            if version_of(loaded) != adapter.version:
                raise UserError("its files have been changed since it was loaded")
            prepared = self._prepared(adapter.name, loaded)
        except (UserError, OSError) as error:
            failed = str(error)
        finally:
            with self._lock:
                adapter.prepared, adapter.failed, adapter.reading = prepared, failed, False
                if prepared is None and not failed:
                    adapter.failed = "reading it failed"
                self._evict_from_host()
            wake()

    def _free_slot(self) -> int | None:
        """A free slot, or that of the least recently used adapter that no request runs with."""
        if None in self._slots:
            return self._slots.index(None)
        idle = [
            (adapter.last_used, slot)
            for slot, adapter in enumerate(self._slots)
            if adapter is not None and not adapter.running and not adapter.pinned
        ]
        return min(idle)[1] if idle else None

    def _drop_if_unused(self, adapter: AdapterVersion) -> None:
        if adapter.draining and not adapter.users:
            if adapter.slot is not None:
                self._slots[adapter.slot] = None
            adapter.slot = adapter.prepared = None

    def _evict_from_host(self) -> None:
        """Evict the least recently used adapters from host memory."""
        kept = [adapter for adapter in self._adapters.values() if adapter.prepared is not None]
        kept.sort(key=lambda adapter: adapter.last_used)
        for adapter in kept[: max(0, len(kept) - self._host)]:
            if adapter.slot is None and not adapter.users and not adapter.pinned:
                adapter.prepared = None


def version_of(adapter: Adapter) -> str:
    """Return a digest of an adapter's contents: two contents of one name have two versions."""
    digest = hashlib.sha256(json.dumps([str(adapter.method), adapter.prompt_format.to_dict()]).encode())
    for leaf in jax.tree.leaves(adapter.params):
        values: Any = jax.device_get(leaf)
        digest.update(f"{values.shape}{values.dtype}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()[:16]
