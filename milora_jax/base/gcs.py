"""A directory of Google Cloud Storage: small files are copied, of large ones ranges are read.

tensorstore speaks to the storage, with the credentials of the machine (a service account of a TPU VM,
``gcloud auth application-default login``) or without any for a public bucket; requests that fail are tried
again, with growing pauses.
"""

from __future__ import annotations

import bisect
import functools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from milora_jax.base.byte_files import Span, read_span
from milora_jax.base.tensor_file import LARGEST_HEADER, LENGTH_BYTES, declared_bytes
from milora_jax.errors import UserError

SCHEME = "gs://"

RETRIES = {"max_retries": 6, "initial_delay": "500ms", "max_delay": "16s"}
"""About half a minute: a pod whose storage is away for longer does better to say so."""

LARGEST_FILE = 2**53
"""More bytes than any file has; and offsets up to it are whole numbers everywhere."""

OUT_OF_RANGE = "OUT_OF_RANGE"
"""How tensorstore's error begins where a range is not in the file."""

AHEAD = 6
"""Ranges that a reader has asked for at a time: one connection does not fill a machine's network."""


class RemoteDirectory:
    """The files directly within ``gs://BUCKET/PATH``."""

    def __init__(self, url: str) -> None:
        """Take the name of a directory.

        Raises:
          UserError: it is none.
        """
        import tensorstore

        bucket, _, path = url.removeprefix(SCHEME).partition("/")
        self.url, prefix = url.rstrip("/"), path.rstrip("/")
        spec = {
            "driver": "gcs",
            "bucket": bucket,
            "path": f"{prefix}/" if prefix else "",
            "context": {"gcs_request_retries": RETRIES},
        }
        try:
            if not url.startswith(SCHEME):
                raise ValueError(f"expected {SCHEME}BUCKET/PATH")
            self._store = tensorstore.KvStore.open(spec).result()
        except ValueError as error:
            raise UserError(f"model {url!r}: {_reason(error)}") from None

    def names(self) -> list[str]:
        """The names of the files, in order.

        Raises:
          UserError: the storage does not say, or there are none.
        """
        try:
            keys = self._store.list().result()
        except ValueError as error:
            raise UserError(f"{self.url}: cannot be listed ({_reason(error)})") from None
        names = sorted(key.decode(errors="replace") for key in keys)
        found = [name for name in names if name and name == PurePosixPath(name).name and name != ".."]
        if not found:
            raise UserError(f"{self.url}: no such directory, or there are no files in it")
        return found

    def content(self, name: str) -> bytes:
        """All of a small file.

        Raises:
          UserError: it is not there, or cannot be read.
        """
        return _result(self._store.read(name), f"{self.url}/{name}").value

    def file(self, name: str) -> RemoteFile:
        """A large safetensors file."""
        return RemoteFile(self._store, self.url, name)


@dataclass(frozen=True)
class RemoteFile:
    """A safetensors file of a remote directory; see ``byte_files.ByteFile``.

    Attributes:
      store: of its directory.
      url: of its directory.
      key: its name there.
    """

    store: Any
    url: str
    key: str

    block = 2**22
    """A range of a few milliseconds' transfer, so that the time until it begins does not count for much."""

    @property
    def name(self) -> str:
        """Its whole address."""
        return f"{self.url}/{self.key}"

    def size(self) -> int:
        """Bytes of the file."""
        return self._size

    @functools.cached_property
    def _size(self) -> int:
        """The size, found once.

        tensorstore does not tell sizes. But a safetensors file says itself where it ends: that it does not
        end before that and not behind costs two small requests, and only a damaged one is searched.
        """
        told = self._told()
        if told is not None and self._reaches(told) and not self._reaches(told + 1):
            return told
        most = LENGTH_BYTES
        while self._reaches(most):
            most *= 2
        return bisect.bisect_left(range(1, most), True, key=lambda count: not self._reaches(count))

    def read(self, spans: Iterable[Span]) -> Iterator[memoryview]:
        """The bytes of every span, the next few of them already on their way."""
        coming: deque[Any] = deque()
        for start, end in spans:
            coming.append(self.store.read(self.key, byte_range=slice(start, end)))
            if len(coming) > AHEAD:
                yield self._arrived(coming.popleft())
        while coming:
            yield self._arrived(coming.popleft())

    @functools.cached_property
    def _generation(self) -> bytes:
        """Which version of the file this is; the storage replaces files while they are read."""
        return _result(self.store.read(self.key, byte_range=slice(0, 1)), self.name).stamp.generation

    def _arrived(self, coming: Any) -> memoryview:
        found = _result(coming, self.name)
        if found.stamp.generation != self._generation:
            raise UserError(f"{self.name}: was replaced while it was read")
        return memoryview(found.value)

    def _told(self) -> int | None:
        """Where the header says that the file ends, if there is a header."""
        if not self._reaches(LENGTH_BYTES):
            return None
        length = int.from_bytes(read_span(self, 0, LENGTH_BYTES), "little")
        if length > LARGEST_HEADER or not self._reaches(LENGTH_BYTES + length):
            return None
        data = declared_bytes(read_span(self, LENGTH_BYTES, LENGTH_BYTES + length))
        return None if data is None else LENGTH_BYTES + length + data

    def _reaches(self, count: int) -> bool:
        """Whether the file has so many bytes."""
        if count > LARGEST_FILE:
            return False
        try:
            self.store.read(self.key, byte_range=slice(count - 1, count)).result()
        except ValueError as error:
            if str(error).startswith(OUT_OF_RANGE):
                return False
            raise UserError(f"{self.name}: {_reason(error)}") from None
        return True


def _result(coming: Any, name: str) -> Any:
    """What a read brought.

    Raises:
      UserError: nothing.
    """
    try:
        found = coming.result()
    except ValueError as error:
        reason = "ends where there were more bytes" if str(error).startswith(OUT_OF_RANGE) else _reason(error)
        raise UserError(f"{name}: {reason}") from None
    if found.state != "value":
        raise UserError(f"{name}: not there")
    return found


def _reason(error: Exception) -> str:
    """The first line of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
