"""Addresses ``SCHEME://...`` of places that are no local directories.

An address that is taken for a path would be written to a folder named after its scheme, so every path that a
user gives is looked at here first.
"""

from __future__ import annotations

import re
from pathlib import Path

from milora_jax.errors import UserError

BUCKETS = "gs://"
"""How an address in Google Cloud Storage begins."""

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*):/+(.*)", re.DOTALL)


def scheme_of(path: str | Path) -> str:
    """The scheme of an address; "" for a local path. A ``Path`` has lost a slash of an address.

    >>> scheme_of("s3://bucket/x"), scheme_of(Path("gs://bucket/x")), scheme_of("./gs:/x"), scheme_of("a:b/c")
    ('s3', 'gs', '', '')
    """
    found = _ADDRESS.fullmatch(str(path))
    return found[1] if found else ""


def in_bucket(path: str | Path) -> str | None:
    """The address of a place in a bucket; None for a local path.

    Raises:
      UserError: it is an address with another scheme.

    >>> in_bucket("gs://bucket/runs/math"), in_bucket(Path("gs://bucket/runs/math")), in_bucket("runs/math")
    ('gs://bucket/runs/math', 'gs://bucket/runs/math', None)
    """
    found = _ADDRESS.fullmatch(str(path))
    if found is None:
        return str(path) if str(path).startswith("gs:") else None  # malformed, as its reader will say
    scheme, place = found.groups()
    address = f"{scheme}://{place}" if isinstance(path, Path) else str(path)
    if f"{scheme}://" != BUCKETS:
        raise UserError(f"{address!r}: scheme {scheme!r}: expected a directory or {BUCKETS}BUCKET/PATH")
    return address


def require_local(path: str | Path, otherwise: str) -> None:
    """Refuse an address where only a local directory will do.

    Args:
      otherwise: what is expected, for the error.

    Raises:
      UserError: the path is an address.
    """
    if scheme_of(path):
        raise UserError(f"{str(path)!r}: expected {otherwise}")


def local_path(text: str) -> Path:
    """A path that a user gives; for command lines.

    Raises:
      UserError: it is an address.
    """
    require_local(text, "a local path")
    return Path(text)
