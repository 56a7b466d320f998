"""Write files so that a crash leaves the old content or the new, and read files of unknown origin."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from milora_jax.addresses import require_local
from milora_jax.errors import UserError

LARGEST_FILE = 2**36
"""Bytes of the largest file that is read into memory: 64 GiB."""


UNFINISHED = ".milora-partial"
"""Suffix of the hidden names under which new directories are written."""


def fsync_directory(directory: Path) -> None:
    """Make the names in ``directory`` (creations, renames, deletions) survive a power loss."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """The name under which :func:`write_atomic` prepares the content of ``path``: same directory, hidden.

    The name is fixed so that a killed run leaves at most one, which the next write overwrites.
    """
    return path.with_name(f".{path.name}.tmp")


def write_atomic(path: Path, content: bytes) -> None:
    """Replace the file ``path`` by ``content`` in one step that is on the disk when this returns.

    Raises:
      OSError: the disk is full, the directory is missing, ...; ``path`` is then as it was.
    """
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            # Without it the rename may reach the disk before the bytes do.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def json_bytes(value: Any) -> bytes:
    """Encode a JSON value with sorted keys, so that equal values give equal bytes.

    Non-finite floats become Python's ``NaN`` and ``Infinity``, which :func:`read_json` reads.
    """
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def write_json_atomic(path: Path, value: Any) -> None:
    """Write ``value`` as JSON to ``path``, all or nothing.

    Raises:
      UserError: the file cannot be written; names the path and the reason.
    """
    content = json_bytes(value)
    try:
        write_atomic(path, content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def read_json(path: Path) -> Any:
    """Read the value in the JSON file ``path``.

    Raises:
      UserError: the file cannot be read or is not JSON; names the path and the reason.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except RecursionError as error:
        raise UserError(f"cannot read {path}: nested too deeply") from error
    except ValueError as error:  # bad UTF-8, bad JSON, or an integer of thousands of digits
        raise UserError(f"cannot read {path}: not JSON ({error})") from error


def require_new(path: Path) -> None:
    """Refuse a path for :func:`new_directory` that exists.

    Raises:
      UserError: the path exists and is not an empty directory.
    """
    require_local(path, "a local directory, which can be copied to a bucket")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UserError(f"{path}: exists and is no directory, expected a new or an empty one")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{path}: exists and is not empty, expected a new or an empty directory")


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Make a directory that appears at ``path`` with everything written into it, or not at all.

    The ``with`` block gets a hidden sibling, which is renamed into place at its end, or removed after an
    error, like the parents that were made for it. The writer holds a lock on the sibling, which tells one
    that is being written from one that a killed process left. If two processes write to one path, the first
    to finish gets it.

    Raises:
      UserError: ``path`` exists and is not an empty directory, or the sibling cannot be made or renamed.
    """
    require_new(path)
    final = Path(os.path.abspath(path))
    made = [parent for parent in final.parents if not parent.exists()]
    partial = lock = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(final.parent, f".{glob.escape(final.name)}.*{UNFINISHED}")
        partial = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=UNFINISHED, dir=final.parent))
        lock = _locked(partial)
        partial.chmod(final.stat().st_mode & 0o7777 if final.is_dir() else 0o777 & ~_umask())
        yield partial
        os.replace(partial, final)
        fsync_directory(final.parent)
        made = []
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()


def _remove_abandoned(directory: Path, pattern: str) -> None:
    """Remove what killed processes left under names of a pattern."""
    for partial in directory.glob(pattern):
        lock = _locked(partial)
        if lock is not None:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)


def _locked(directory: Path) -> int | None:
    """Lock a directory until the process ends; None if another process has the lock."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def scratch_directory(prefix: str) -> Iterator[Path]:
    """Make a temporary directory for the ``with`` block, and remove those that killed processes left.

    Args:
      prefix: of its name, and of the names of those to remove.

    Raises:
      UserError: it cannot be made.
    """
    where = Path(tempfile.gettempdir())
    _remove_abandoned(where, f"{prefix}*{UNFINISHED}")
    directory, lock = where, None
    try:
        # Another process may take a new one for one that was left, until it is locked.
        while lock is None or not directory.exists():
            directory = Path(tempfile.mkdtemp(prefix=prefix, suffix=UNFINISHED))
            lock = _locked(directory)
    except OSError as error:
        raise UserError(f"cannot make a temporary directory in {where}: {error.strerror}") from error
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _umask() -> int:
    """The umask of this process, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def read_bytes(path: Path, largest: int = LARGEST_FILE) -> bytes:
    """Read a regular file once, through a descriptor that follows no symbolic link.

    Raises:
      UserError: the file is missing, a symbolic link, not regular, or larger than ``largest``.
    """
    try:
        # Without O_NONBLOCK opening a FIFO would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        reason = "a symbolic link" if error.errno == errno.ELOOP else (error.strerror or "").lower()
        raise UserError(f"{path}: {reason}, expected a regular file") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: not a regular file")
    with open(descriptor, "rb") as file:
        if status.st_size > largest:
            raise UserError(f"{path}: has {status.st_size} bytes, expected at most {largest}")
        try:
            return file.read(status.st_size)
        except MemoryError:
            raise UserError(f"{path}: has {status.st_size} bytes, more than there is memory for") from None
