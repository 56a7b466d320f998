"""The adapters of a server: in directories, in host memory, and some of them on the device.

An :class:`Entry` is one version of an adapter. Whoever decodes with it holds it, so a version that was
unloaded or replaced meanwhile is kept until the last of its requests is done. Reading and checking happen
beside the device loop; writing a slot of the bank is the loop's, between two of its steps.
"""

from __future__ import annotations

import hashlib
import itertools
import json
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
from milora_jax.generation.bank import Bank, RankError, rank_of
from milora_jax.model_config import ModelConfig
from milora_jax.prompt_format import PromptFormat
from milora_jax.serving.keys import NAME
from milora_jax.storage.adapters import read_adapter
from milora_jax.types import PyTree

BASE_SLOT = 0
"""Of the bank: where requests for the base alone sit."""


@dataclass(eq=False)
class Entry:
    """One version of an adapter.

    Attributes:
      version: tells two contents of one name apart.
      prompt_format: how prompts are written for it.
      prepared: as a slot of the bank holds it, in host memory; None while it lies in its directory alone.
      slot: where it is on the device; None while it is not.
      users: requests that hold it, waiting ones included: the version is kept for them.
      running: requests that decode with it: its slot is kept for them.
      pinned: never taken off the device.
      draining: unloaded or replaced: no new request gets it.
      used: when it was last wanted, as a running number.
      failed: why it could not be read again; empty where it could.
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
    used: int = 0
    failed: str = ""
    reading: bool = field(default=False, repr=False)


@dataclass(frozen=True)
class Model:
    """What a server's adapters act on.

    Attributes:
      base: in the decode layout.
      directory: of its files, for the fingerprint.
      quantize: how it is kept; an adapter of a base that was kept otherwise is refused.
    """

    base: Base
    config: ModelConfig
    directory: Path
    quantize: str


class AdapterStore:
    """Adapters by name.

    Args:
      first: adapters to begin with, at least one: its method is that of all.
      slots: adapters on the device at the same time.
      host: adapters in host memory; others are read again from their directories when they are wanted.
      reader: runs what reads from the disk.
      rank: that adapters may have at least which are loaded later, where those of ``first`` have less.
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
    ) -> None:
        self._model, self._reader, self._host = model, reader, max(host, slots)
        self._fingerprint = base_fingerprint(model.directory)
        self._lock = threading.Lock()
        self._clock = itertools.count(1)
        self._entries: dict[str, Entry] = {}
        # The first slot is never written: pairs of zeros change nothing, so it is the base alone.
        nobody = Entry("", Path(), "", PromptFormat(), None, pinned=True, slot=BASE_SLOT)
        self._seats: list[Entry | None] = [nobody, *[None] * slots]
        read = {name: self._read(name, path) for name, path in first.items()}
        ranks = [rank_of(model.base, model.config, adapter, name) for name, adapter in read.items()]
        like = next(iter(read.values()))
        self.bank = Bank(model.base, model.config, like, len(self._seats), rank=max(rank, *ranks))
        for name, adapter in read.items():
            self._add(name, first[name], adapter, name in pinned)
        # The device has some from the start, and the program that writes them has been compiled.
        for entry in sorted(self._entries.values(), key=lambda entry: not entry.pinned)[:slots]:
            self.seat(entry)
            self.leave(entry)

    @property
    def has_base(self) -> bool:
        """Whether the base alone can be asked for: adapters are pairs, of which zeros change nothing."""
        return self.bank.tenants.method.is_pairs

    def names(self) -> list[str]:
        """Of the adapters that new requests may ask for."""
        with self._lock:
            return sorted(self._entries)

    def hold(self, name: str) -> Entry | None:
        """The newest version of an adapter, for one request; None if there is no such adapter."""
        with self._lock:
            entry = self._entries.get(name)
            if entry is not None:
                entry.users += 1
                entry.used = next(self._clock)
            return entry

    def hold_again(self, entry: Entry) -> None:
        """Hold a version for one more who uses it, by somebody who holds it."""
        with self._lock:
            entry.users += 1

    def release(self, entry: Entry) -> None:
        """Say that a request that held a version is done."""
        with self._lock:
            entry.users -= 1
            if not entry.users:
                entry.failed = ""  # the next who wants it reads it again: a disk can come back
            self._forget_if_gone(entry)

    def load(self, name: str, directory: Path, pinned: bool = False) -> Entry:
        """Read an adapter, check it, and offer it; one of the same name goes on for who holds it.

        Takes as long as reading takes: not for the loop.

        Raises:
          UserError: for a bad name, a damaged or hostile directory, an adapter of another base or method, or
            of too high a rank; what was offered before stays so.
        """
        return self._add(name, directory, self._read(name, directory), pinned)

    def unload(self, name: str) -> bool:
        """Offer an adapter no more; False if there is none of that name."""
        with self._lock:
            entry = self._entries.pop(name, None)
            if entry is None:
                return False
            entry.draining = True
            self._forget_if_gone(entry)
            return True

    def seatable(self, entry: Entry, wake: Callable[[], None]) -> bool:
        """Whether the loop can have an adapter on the device now; if it must be read first, that begins.

        Args:
          wake: called from another thread when it has been read, or could not be.
        """
        with self._lock:
            if entry.slot is not None or entry.failed:
                return True
            if entry.prepared is None:
                if not entry.reading:
                    entry.reading = True
                    self._reader.submit(self._read_again, entry, wake)
                return False
            return self._seat_for() is not None

    def seat(self, entry: Entry) -> int:
        """The slot of an adapter that is :meth:`seatable`, for one more who decodes with it.

        Written if the adapter is not there. The loop's alone, like :meth:`leave`.
        """
        with self._lock:
            if entry.slot is not None:
                entry.running += 1
                return entry.slot
            slot = self._seat_for()
            if slot is None or entry.prepared is None:
                raise RuntimeError("an adapter that cannot be seated was seated")
            before = self._seats[slot]
            if before is not None:
                before.slot = None
            self._seats[slot], entry.slot = entry, slot
            prepared = entry.prepared
        try:
            self.bank.place(prepared, slot)
        except BaseException:
            with self._lock:
                self._seats[slot] = entry.slot = None  # nobody knows what it holds
            raise
        with self._lock:
            entry.running += 1
        return slot

    def leave(self, entry: Entry) -> None:
        """Say that somebody decodes with an adapter no more."""
        with self._lock:
            entry.running -= 1

    def on_device(self) -> list[str]:
        """Names of the adapters in the bank's slots."""
        with self._lock:
            return [entry.name for entry in self._seats[1:] if entry is not None]

    def _read(self, name: str, directory: Path) -> Adapter:
        if not NAME.fullmatch(name):
            raise UserError(f"adapter name {name!r}: expected letters, digits, '.', '_', '-', at most 64")
        adapter, metadata = read_adapter(directory)
        if metadata["base_fingerprint"] != self._fingerprint:
            raise UserError(f"adapter {name!r} was made on other files than those of the base that is served")
        kept = metadata.get("quantize", "none")
        if kept != self._model.quantize:
            raise UserError(
                f"adapter {name!r} was made on a base kept as {kept!r}: this one is kept as "
                f"{self._model.quantize!r}"
            )
        return adapter

    def _prepared(self, name: str, adapter: Adapter) -> PyTree:
        try:
            return jax.device_get(self.bank.prepare(name, adapter))
        except RankError as error:
            raise UserError(f"{error}; start the server with --max-lora-rank {error.rank}") from None

    def _add(self, name: str, directory: Path, adapter: Adapter, pinned: bool) -> Entry:
        prepared = self._prepared(name, adapter)
        entry = Entry(name, directory, version_of(adapter), adapter.prompt_format, prepared, pinned)
        with self._lock:
            pins = sum(other.pinned for other in self._entries.values() if other.name != name)
            if pinned and pins >= len(self._seats) - 2:
                raise UserError(
                    f"adapter {name!r} cannot be pinned: of --adapters-on-device {len(self._seats) - 1} one "
                    "must stay free for the others"
                )
            before = self._entries.get(name)
            entry.used = next(self._clock)
            self._entries[name] = entry
            if before is not None:
                before.draining = True
                self._forget_if_gone(before)
            self._leave_host()
        return entry

    def _read_again(self, entry: Entry, wake: Callable[[], None]) -> None:
        prepared, failed = None, ""
        try:
            adapter = self._read(entry.name, entry.directory)
            if version_of(adapter) != entry.version:
                raise UserError("its files have been changed since it was loaded")
            prepared = self._prepared(entry.name, adapter)
        except (UserError, OSError) as error:
            failed = str(error)
        finally:
            with self._lock:
                entry.prepared, entry.failed, entry.reading = prepared, failed, False
                if prepared is None and not failed:
                    entry.failed = "reading it failed"
                self._leave_host()
            wake()

    def _seat_for(self) -> int | None:
        """A free slot, or that of the adapter that was not wanted for longest and is not in use."""
        if None in self._seats:
            return self._seats.index(None)
        idle = [
            (entry.used, slot)
            for slot, entry in enumerate(self._seats)
            if entry is not None and not entry.running and not entry.pinned
        ]
        return min(idle)[1] if idle else None

    def _forget_if_gone(self, entry: Entry) -> None:
        if entry.draining and not entry.users:
            if entry.slot is not None:
                self._seats[entry.slot] = None
            entry.slot = entry.prepared = None

    def _leave_host(self) -> None:
        """Take those out of host memory that were not wanted for longest."""
        kept = [entry for entry in self._entries.values() if entry.prepared is not None]
        kept.sort(key=lambda entry: entry.used)
        for entry in kept[: max(0, len(kept) - self._host)]:
            if entry.slot is None and not entry.users and not entry.pinned:
                entry.prepared = None


def version_of(adapter: Adapter) -> str:
    """A digest of an adapter's contents: two contents of one name have two versions."""
    digest = hashlib.sha256(json.dumps([str(adapter.method), adapter.prompt_format.to_dict()]).encode())
    for leaf in jax.tree.leaves(adapter.params):
        values: Any = jax.device_get(leaf)
        digest.update(f"{values.shape}{values.dtype}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()[:16]
