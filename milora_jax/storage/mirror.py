"""A workdir in a bucket: a temporary folder of this process, and its mirror below ``gs://BUCKET/PATH``.

Everything that reads or writes a workdir works on the folder, as for a workdir on a disk. A run fetches the
folder when it begins, publishes every step once it is complete on the disk, and uploads the other files when
they change. In the bucket a step exists only once its manifest, uploaded last, is there, and it is loaded
only if every file has the manifest's SHA-256. What an interrupted upload or deletion leaves is ignored by
readers and deleted by the next run.

Every process of a run has a folder of its own and writes whole steps into it; the first one locks the bucket
and is the only one that writes there.
"""

from __future__ import annotations

import atexit
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from milora_jax.addresses import in_bucket
from milora_jax.base.source import WEIGHTS
from milora_jax.errors import UserError, stand_for
from milora_jax.parallel.processes import is_first, several, wait_for_all
from milora_jax.storage.bucket import Bucket
from milora_jax.storage.bucket_lock import BucketLock
from milora_jax.storage.files import scratch_directory
from milora_jax.storage.lock import LOCK
from milora_jax.storage.manifest import MANIFEST
from milora_jax.storage.peft_settings import PEFT_CONFIG

SYNC_SECONDS = 10.0
"""Time between two uploads of the logs that have changed: a bucket cannot append, so each is rewritten."""

STATES = "checkpoints"
"""The folder of training states, which only a run and the checks of a workdir read."""

TRACKERS = ("tensorboard", "wandb")
"""Folders that are uploaded but never fetched: a resumed run adds files to them."""

ATTEMPTS = 3
"""How often a reader begins again because a run deleted a step while it was read."""

PREFIX = "milora_jax-"
"""Of the names of the temporary folders."""

_COPIES: dict[Path, Mirror] = {}
"""The mirrors of the folders that :func:`fetched` has made."""

_STEP = re.compile(r"((?:(?:checkpoints|best)/)?(?:0|[1-9][0-9]*)/).+")


class VanishedError(UserError):
    """An object was deleted between the list of all objects and its turn to be read."""


class Opened(NamedTuple):
    """The workdir of a run.

    Attributes:
      path: the folder to work in.
      mirror: publishes its steps; None where the folder is the workdir itself.
    """

    path: Path
    mirror: Mirror | None


class Mirror:
    """A local folder and the objects of a bucket that it stands for.

    Args:
      folder: an empty directory.
      lock: held by the process that publishes steps; None for one that does not.
    """

    def __init__(self, bucket: Bucket, folder: Path, lock: BucketLock | None = None) -> None:
        self.bucket, self.folder, self._lock = bucket, folder, lock
        self._known: dict[str, tuple[tuple[int, int], bytes]] = {}
        self._mutex = threading.Lock()

    def fetch(self, skipped: Iterable[str]) -> None:
        """Download everything but unfinished steps and the ``skipped`` folders.

        Raises:
          UserError: something cannot be read, or has a name that no file can have; see also
            :class:`VanishedError`.
        """
        names = self.bucket.names()
        kept = [name for name in names if name != LOCK and PurePosixPath(name).parts[0] not in skipped]
        if not {MANIFEST, PEFT_CONFIG}.intersection(names):
            # Weights beside a config are a base, which was named by mistake.
            kept = [name for name in kept if "/" in name or not name.endswith(WEIGHTS)]
        for name in kept:
            _require_file_name(name, self.bucket.url)
        for name, (content, generation) in self.bucket.read_all(_of_whole_steps(kept)):
            if content is None:
                raise VanishedError(f"{self.bucket.url}/{name} was deleted while it was to be read")
            path = self.folder / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            except OSError as error:
                raise UserError(f"cannot copy {self.bucket.url}/{name} to {path}: {error.strerror}") from None
            self._known[name] = _state_of(path), generation

    def delete_unfinished(self) -> None:
        """Delete what interrupted uploads and deletions of steps left in the bucket."""
        names = self.bucket.names()
        self.bucket.write_all((name, None) for name in sorted(set(names) - set(_of_whole_steps(names))))

    def publish(self, step: Path) -> None:
        """Upload a complete step of the folder, its manifest last; the logs of its time come before it.

        Raises:
          UserError: the bucket cannot be written, or another run has taken it over.
        """
        if self._lock is None:
            return
        self.sync()
        self.withdraw(step)
        below = _name(step, self.folder)
        files = [path for path in sorted(step.rglob("*")) if path.is_file() and path != step / MANIFEST]
        self.bucket.write_all((f"{below}/{_name(path, step)}", path.read_bytes()) for path in files)
        self._lock.confirm()
        self.bucket.write(f"{below}/{MANIFEST}", (step / MANIFEST).read_bytes())

    def withdraw(self, step: Path) -> None:
        """Delete a step of the bucket, its manifest first.

        Raises:
          UserError: as for :meth:`publish`.
        """
        if self._lock is None:
            return
        self._lock.confirm()
        below = f"{_name(step, self.folder)}/"
        found = self.bucket.names(below)
        if found:
            self.bucket.write(f"{below}{MANIFEST}", None)
            self.bucket.write_all((name, None) for name in found)

    def sync(self) -> None:
        """Upload the files outside of steps that have changed.

        Raises:
          UserError: one cannot be written, another program has changed it in the bucket, or another run has
            taken the workdir over.
        """
        with self._mutex:
            for path in _loose_files(self.folder):
                with suppress(FileNotFoundError):  # a tracker's own temporary file
                    self._upload(path, _name(path, self.folder))

    def _upload(self, path: Path, name: str) -> None:
        state, (known, generation) = _state_of(path), self._known.get(name, (None, b""))
        if state == known:
            return
        content = path.read_bytes()
        if self._lock is not None:
            self._lock.confirm()
        generation = self.bucket.write(name, content, generation or self.bucket.read(name).generation)
        if generation is None:
            raise UserError(f"{self.bucket.url}/{name} was changed by another program, and is left as it is")
        self._known[name] = state, generation


@contextmanager
def opened_workdir(
    address: str | Path, log: Callable[[str], None], stop: Callable[[], bool] = lambda: False
) -> Iterator[Opened]:
    """The workdir of a run for the ``with`` block; all processes of the run must call this.

    A workdir in a bucket is locked and fetched, and its last changes are uploaded at the end.

    Args:
      address: a directory, or ``gs://BUCKET/PATH``.
      log: receives a line before a wait for the lock.
      stop: asked while waiting; returns whether to give up. Several processes only ask it together, so it is
        not asked where there are any.

    Raises:
      UserError: see :class:`BucketLock` and :meth:`Mirror.fetch`.
    """
    url = in_bucket(address)
    if url is None:
        yield Opened(Path(address), None)
        return
    bucket = Bucket(url)
    with scratch_directory(PREFIX) as scratch, ExitStack() as stack:
        mirror = Mirror(bucket, _folder_for(scratch, url))
        if is_first():
            waits = (lambda: False) if several() else stop
            lock = stack.enter_context(BucketLock(bucket, log, waits))
            mirror = Mirror(bucket, mirror.folder, lock)
            mirror.delete_unfinished()
        wait_for_all("workdir locked")
        mirror.fetch(TRACKERS)
        if is_first():
            stack.enter_context(_synced(mirror, SYNC_SECONDS))
        yield Opened(mirror.folder, mirror)


@contextmanager
def fetched(path: str | Path, states: bool = False) -> Iterator[Path]:
    """The path itself, or what a reader needs of ``gs://BUCKET/PATH``, in a folder for the ``with`` block.

    Args:
      path: a workdir, an export or a PEFT adapter.
      states: fetch the training states too.

    Raises:
      UserError: the address cannot be read.
    """
    url = in_bucket(path)
    if url is None:
        yield Path(path)
        return
    bucket = Bucket(url)
    with scratch_directory(PREFIX) as scratch:
        mirror = _fetched(bucket, scratch, TRACKERS if states else (*TRACKERS, STATES))
        _COPIES[mirror.folder] = mirror
        try:
            yield mirror.folder
        finally:
            del _COPIES[mirror.folder]


def _fetched(bucket: Bucket, scratch: Path, skipped: Iterable[str]) -> Mirror:
    for attempt in range(ATTEMPTS):
        mirror = Mirror(bucket, _folder_for(scratch / str(attempt), bucket.url))
        with suppress(VanishedError):
            mirror.fetch(skipped)
            return mirror
    raise UserError(f"{bucket.url} changes faster than it can be read")


def local_copy(path: str | Path, states: bool = False) -> Path:
    """:func:`fetched`, until the process ends."""
    until_exit = ExitStack()
    atexit.register(until_exit.close)
    return until_exit.enter_context(fetched(path, states))


def with_states(path: str) -> Path:
    """:func:`local_copy` with the training states."""
    return local_copy(path, states=True)


@contextmanager
def synced(path: Path | None) -> Iterator[None]:
    """Upload what the ``with`` block changes outside of steps in a local copy of a bucket.

    Args:
      path: from :func:`fetched` or :func:`local_copy`; nothing happens for None or any other directory.
    """
    mirror = None if path is None else _COPIES.get(path)
    with nullcontext() if mirror is None else _synced(mirror, SYNC_SECONDS):
        yield


@contextmanager
def _synced(mirror: Mirror, seconds: float) -> Iterator[None]:
    """Upload changed files every few seconds, and at the end; then a failure is an error."""
    ended = threading.Event()

    def keep() -> None:
        while not ended.wait(seconds):
            with suppress(UserError, OSError):  # the next step, or the end of the run, reports it
                mirror.sync()

    thread = threading.Thread(target=keep, name="workdir sync", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        ended.set()
        thread.join()
        with suppress(UserError, OSError):
            mirror.sync()
        raise
    ended.set()
    thread.join()
    mirror.sync()


def _folder_for(scratch: Path, url: str) -> Path:
    """A folder with the name of the workdir, for which messages say the address."""
    folder = scratch / PurePosixPath(url).name
    folder.mkdir(parents=True)
    stand_for(folder, url.rstrip("/"))
    return folder


def _loose_files(folder: Path) -> Iterator[Path]:
    """The files outside of steps, without hidden and temporary ones."""
    for parent, folders, names in os.walk(folder):
        top = Path(parent) == folder
        folders[:] = [each for each in folders if not each.startswith(".") and not (top and _of_steps(each))]
        for name in names:
            path = Path(parent, name)
            if not name.startswith(".") and path.suffix != ".tmp" and not path.is_symlink():
                yield path


def _of_steps(name: str) -> bool:
    return name in (STATES, "best") or name.isdecimal()


def _of_whole_steps(names: list[str]) -> list[str]:
    """The names without those of steps that have no manifest."""
    present = set(names)
    steps = {name: _STEP.fullmatch(name) for name in names}
    return [name for name, match in steps.items() if match is None or f"{match[1]}{MANIFEST}" in present]


def _require_file_name(name: str, url: str) -> None:
    """Refuse the name of an object that is not that of a file below a folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or "\0" in name:
        raise UserError(f"{url}: an object has the name {name!r}, which no file can have")


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _state_of(path: Path) -> tuple[int, int]:
    """What changes when a file does."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size
