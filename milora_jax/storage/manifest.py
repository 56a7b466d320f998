"""The seal of a directory: ``manifest.json`` with size and SHA-256 of every file below it.

Neither Orbax nor safetensors stores a checksum of the data: a flipped bit would load as a wrong weight. So a
directory is valid only if every byte in it is the byte that was written.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from milora_jax.errors import UserError
from milora_jax.storage.files import (
    fsync_directory,
    json_bytes,
    read_bytes,
    read_json,
    temporary_name,
    write_atomic,
)

MANIFEST = "manifest.json"
FORMAT = 1
"""Version of the manifest's layout; a reader refuses any other."""

DIFFERS = "content differs from its SHA-256"


class DamagedError(UserError):
    """A directory differs from what was written: which directory, which file in it, and how."""

    def __init__(self, directory: Path, file: str, reason: str) -> None:
        super().__init__(f"{directory} is damaged: {file}: {reason}")
        self.directory = directory
        self.file = file
        self.reason = reason


def write_manifest(directory: Path) -> None:
    """Fsync every file below ``directory``, then write the manifest of all of them.

    The manifest appears last and atomically, so its presence means that the rest is complete.

    Raises:
      OSError: a file cannot be read, fsynced or written.
      DamagedError: an entry is neither a regular file nor a directory.
    """
    temporary_name(directory / MANIFEST).unlink(missing_ok=True)
    files = {}
    for name in sorted(_regular_files(directory)):
        files[name] = _digest(directory / name, sync=True)
    for parent, _, _ in os.walk(directory, topdown=False):
        fsync_directory(Path(parent))
    write_atomic(directory / MANIFEST, json_bytes({"format": FORMAT, "files": files}))


def verify_manifest(directory: Path) -> None:
    """Check every byte below ``directory`` against its manifest.

    Raises:
      DamagedError: the manifest is missing or unreadable, or a file is missing, extra, of another
        size or content, a symbolic link, or listed under a path outside the directory.
    """
    for error in manifest_errors(directory):
        raise error


def manifest_errors(directory: Path) -> Iterator[DamagedError]:
    """Yield everything that :func:`verify_manifest` would raise."""
    try:
        recorded = _read(directory)
        found = _regular_files(directory)
    except DamagedError as error:
        yield error
        return
    yield from _names_and_sizes(directory, recorded, found)
    # Names come from the walk, never from the manifest: no file outside is opened.
    for name in sorted(name for name, size in found.items() if recorded.get(name, {}).get("size") == size):
        try:
            actual = _digest(directory / name, sync=False)
        except OSError as error:  # a bad sector, or the file was deleted meanwhile
            yield DamagedError(directory, name, f"cannot be read ({error.strerror})")
            continue
        if actual != recorded[name]:
            yield DamagedError(directory, name, DIFFERS)


def read_verified(
    directory: Path, known: Collection[str], wanted: Collection[str] | None = None
) -> dict[str, bytes]:
    """Read files of ``directory`` whose content matches the manifest.

    Each file is read once: the returned content is the checked content, even if the file changes meanwhile.

    Args:
      known: the files that may exist.
      wanted: the files to read; None reads all.

    Raises:
      DamagedError: as in :func:`verify_manifest`, except that the content of files that are not wanted is not
        read; or there is an unknown file.
    """
    recorded = _read(directory)
    for error in _names_and_sizes(directory, recorded, _regular_files(directory)):
        raise error
    for name in sorted(recorded.keys() - set(known)):
        raise DamagedError(directory, name, "not expected here")
    contents = {}
    for name in sorted(recorded.keys() if wanted is None else recorded.keys() & set(wanted)):
        entry = recorded[name]
        try:
            content = read_bytes(directory / name, largest=entry["size"])
        except UserError as error:
            raise DamagedError(directory, name, str(error)) from error
        if {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)} != entry:
            raise DamagedError(directory, name, DIFFERS)
        contents[name] = content
    return contents


def _names_and_sizes(
    directory: Path, recorded: dict[str, dict[str, Any]], found: dict[str, int]
) -> Iterator[DamagedError]:
    """Yield the differences between the manifest and the existing files, before any of them is opened."""
    outside = {name for name in recorded if _leads_outside(name)}
    for name in sorted(outside):
        yield DamagedError(directory, name, "listed under a path outside the directory")
    for name in sorted((recorded.keys() | found.keys()) - outside):
        if name not in found:
            yield DamagedError(directory, name, "missing")
        elif name not in recorded:
            yield DamagedError(directory, name, f"not listed in {MANIFEST}")
        elif found[name] != recorded[name]["size"]:
            expected = recorded[name]["size"]
            yield DamagedError(directory, name, f"{found[name]} bytes, expected {expected}")


def _leads_outside(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or str(path) != name


def _read(directory: Path) -> dict[str, dict[str, Any]]:
    path = directory / MANIFEST
    if not path.is_file() or path.is_symlink():
        raise DamagedError(directory, MANIFEST, "missing" if not path.is_symlink() else "a symbolic link")
    try:
        content = path.read_bytes()
        value = read_json(path)
        # Only the exact bytes that we would write are accepted: a flipped bit may leave valid JSON.
        intact = json_bytes(value) == content
    except OSError as error:
        raise DamagedError(directory, MANIFEST, f"cannot be read ({error.strerror})") from error
    except UserError as error:
        raise DamagedError(directory, MANIFEST, str(error)) from error
    if not intact:
        raise DamagedError(directory, MANIFEST, "altered since it was written")
    if not isinstance(value, dict) or value.keys() != {"format", "files"}:
        raise DamagedError(directory, MANIFEST, "not a manifest: expected the fields format and files")
    if value["format"] != FORMAT:
        raise DamagedError(directory, MANIFEST, f"format {value['format']!r}, this version reads {FORMAT}")
    files = value["files"]
    if not isinstance(files, dict) or any(
        not isinstance(entry, dict)
        or entry.keys() != {"sha256", "size"}
        or type(entry["sha256"]) is not str
        or type(entry["size"]) is not int
        for entry in files.values()
    ):
        raise DamagedError(directory, MANIFEST, "not a manifest: expected sha256 and size of every file")
    return files


def _regular_files(directory: Path) -> dict[str, int]:
    """Relative POSIX path and size of every file below, except the manifest."""
    found = {}
    for parent, directories, names in os.walk(directory):
        for name in directories + names:
            path = Path(parent, name)
            relative = path.relative_to(directory).as_posix()
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                raise DamagedError(directory, relative, "a symbolic link")
            if stat.S_ISREG(status.st_mode):
                found[relative] = status.st_size
            elif not stat.S_ISDIR(status.st_mode):
                raise DamagedError(directory, relative, "not a regular file")
    found.pop(MANIFEST, None)
    return found


def _digest(path: Path, *, sync: bool) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file; with ``sync`` its content is on the disk afterwards."""
    # O_NOFOLLOW: a link made after the walk must not lead out of the directory.
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        if sync:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"sha256": digest, "size": os.fstat(file.fileno()).st_size}
