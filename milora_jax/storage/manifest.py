"""The seal of a directory: ``manifest.json`` with size and SHA-256 of every file below it.

Neither Orbax nor safetensors keeps a checksum of the data: a flipped bit loads as a wrong weight.
So a directory counts only if every byte in it is the byte that was written.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path, PurePosixPath
from typing import Any

from milora_jax.errors import UserError
from milora_jax.storage.files import fsync_directory, json_bytes, read_json, temporary_name, write_atomic

MANIFEST = "manifest.json"
FORMAT = 1
"""Version of the manifest's layout; a reader refuses any other."""


class DamagedError(UserError):
    """A directory that is not what was written: which one, which file in it, and what is wrong."""

    def __init__(self, directory: Path, file: str, reason: str) -> None:
        super().__init__(f"{directory} is damaged: {file}: {reason}")
        self.directory = directory
        self.file = file
        self.reason = reason


def write_manifest(directory: Path) -> None:
    """Bring every file below ``directory`` to the disk, then write the manifest over all of them.

    The manifest appears last and at once, so its presence says that the rest is complete.

    Raises:
      OSError: a file cannot be read, brought to the disk or written.
      DamagedError: there is something below that is neither a regular file nor a directory.
    """
    temporary_name(directory / MANIFEST).unlink(missing_ok=True)
    files = {}
    for name in sorted(_regular_files(directory)):
        files[name] = _digest(directory / name, sync=True)
    for parent, _, _ in os.walk(directory, topdown=False):
        fsync_directory(Path(parent))
    write_atomic(directory / MANIFEST, json_bytes({"format": FORMAT, "files": files}))


def verify_manifest(directory: Path) -> None:
    """Check every byte below ``directory`` against its manifest; return only if all of them match.

    Raises:
      DamagedError: the manifest is missing or unreadable, or a file is missing, extra, of another
        size or content, a symbolic link, or listed under a path outside the directory.
    """
    recorded = _read(directory)
    for name in recorded:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or str(path) != name:
            raise DamagedError(directory, name, "listed under a path outside the directory")
    found = _regular_files(directory)
    for name in sorted(recorded.keys() | found.keys()):
        if name not in found:
            raise DamagedError(directory, name, "missing")
        if name not in recorded:
            raise DamagedError(directory, name, f"not listed in {MANIFEST}")
        if found[name] != recorded[name]["size"]:
            expected = recorded[name]["size"]
            raise DamagedError(directory, name, f"{found[name]} bytes, expected {expected}")
    for name in sorted(recorded):
        try:
            actual = _digest(directory / name, sync=False)
        except OSError as error:  # a bad sector, or the file went away meanwhile
            raise DamagedError(directory, name, f"cannot be read ({error.strerror})") from error
        if actual != recorded[name]:
            raise DamagedError(directory, name, "content differs from its SHA-256")


def _read(directory: Path) -> dict[str, dict[str, Any]]:
    path = directory / MANIFEST
    if not path.is_file() or path.is_symlink():
        raise DamagedError(directory, MANIFEST, "missing" if not path.is_symlink() else "a symbolic link")
    try:
        content = path.read_bytes()
        value = read_json(path)
        # Only the very bytes we would write count: a flipped bit may leave valid JSON behind.
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
    """Relative posix path and size of every file below, without the manifest itself."""
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
    # O_NOFOLLOW: a link put there after the walk must not lead us out of the directory.
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        if sync:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"sha256": digest, "size": os.fstat(file.fileno()).st_size}
