"""Writing small files so that a crash leaves the old content or the new, never a mix."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from milora_jax.errors import UserError


def fsync_directory(directory: Path) -> None:
    """Make the names in ``directory`` (creations, renames, deletions) survive a power loss."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """Where :func:`write_atomic` prepares the content of ``path``: same directory, fixed hidden name.

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
    """The one way this project writes a JSON value, keys sorted: equal values give equal bytes.

    Non-finite floats come out as Python's ``NaN`` and ``Infinity``, which :func:`read_json` reads.
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
    """The value in the JSON file ``path``.

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
