"""Addresses ``SCHEME://...`` of places that are no local directories.

An address that is taken for a path would be written to a folder named after its scheme, so every path that a
user gives is looked at here first.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from milora_jax.errors import UserError

BUCKETS = "gs://"
"""How an address in Google Cloud Storage begins."""

HUB = "hf://"
"""How an address on the Hugging Face Hub begins."""

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


class HubAddress(NamedTuple):
    """A place on the Hugging Face Hub.

    Attributes:
      repository: OWNER/NAME.
      folder: a folder in the repository; "" is the repository itself.
      revision: a branch, a tag or a commit; "" is the newest commit.
    """

    repository: str
    folder: str = ""
    revision: str = ""

    def __str__(self) -> str:
        place = "/".join(filter(None, (self.repository, self.folder)))
        return f"{HUB}{place}@{self.revision}" if self.revision else f"{HUB}{place}"


def on_hub(path: str | Path) -> HubAddress | None:
    """The parts of ``hf://OWNER/NAME[/FOLDER][@REVISION]``; None for any other path.

    Raises:
      UserError: it begins like such an address and is none.

    >>> on_hub("hf://me/math"), on_hub("runs/math")
    (HubAddress(repository='me/math', folder='', revision=''), None)
    >>> str(on_hub(Path("hf://me/math/law@refs/pr/1")))
    'hf://me/math/law@refs/pr/1'
    """
    text = str(path)
    if not text.startswith("hf:"):
        return None
    begins = "hf:/" if isinstance(path, Path) else HUB  # a Path has lost a slash
    place, at, revision = text.removeprefix(begins).partition("@")
    owner, *parts = place.split("/")
    whole = text.startswith(begins) and parts and all((owner, *parts)) and (bool(revision) or not at)
    if not whole or {".", ".."}.intersection((owner, *parts)):
        raise UserError(f"{text!r}: expected {HUB}OWNER/NAME or {HUB}OWNER/NAME@REVISION")
    return HubAddress(f"{owner}/{parts[0]}", "/".join(parts[1:]), revision)


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
