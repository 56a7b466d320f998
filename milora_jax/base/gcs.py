"""A model directory in Google Cloud Storage: small files are copied, weight files are read by byte ranges.

tensorstore's key-value store makes the requests, with the credentials of the machine (a service account of a
TPU VM, ``gcloud auth application-default login``) or without any for a public bucket. It retries after
statuses 429 and 5xx and after truncated bodies, and ``TENSORSTORE_GCS_HTTP_URL`` points it to an emulator. It
is preferred to gcsfs, which returns fewer bytes than were asked for without an error, cannot write on the
condition of a generation, and brings another HTTP stack.
"""

from __future__ import annotations

import bisect
import functools
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from milora_jax.addresses import BUCKETS
from milora_jax.base.byte_files import Span, read_span
from milora_jax.base.json_files import parse_json_object
from milora_jax.base.tensor_file import LARGEST_HEADER, LENGTH_BYTES
from milora_jax.errors import TemporaryError, UserError

RETRIES = {"max_retries": 6, "initial_delay": "500ms", "max_delay": "16s"}
"""Half a minute in all: during a longer outage an error is more useful than waiting."""

LARGEST_FILE = 2**53
"""More bytes than any file has; offsets up to it are exact in every number format."""

OUT_OF_RANGE = "OUT_OF_RANGE"
"""The first word of tensorstore's error for a range outside the file."""

GAVE_UP = "ABORTED"
"""How an error of tensorstore begins that it tried to get past: statuses 429 and 5xx, lost connections."""

AHEAD = 6
"""Ranges that are requested at a time, because one connection does not saturate a machine's network."""

_BODY = re.compile(r" \[http_response_body='(?:[^'\\]|\\.)*'\]")


def open_store(url: str) -> Any:
    """The ``tensorstore.KvStore`` of ``gs://BUCKET/PATH``, whose keys are relative to the path.

    Raises:
      UserError: the name is malformed.
    """
    import tensorstore

    bucket, _, path = url.removeprefix(BUCKETS).partition("/")
    prefix = path.rstrip("/")
    spec = {
        "driver": "gcs",
        "bucket": bucket,
        "path": f"{prefix}/" if prefix else "",
        "context": {"gcs_request_retries": RETRIES},
    }
    try:
        if not url.startswith(BUCKETS):
            raise ValueError(f"expected {BUCKETS}BUCKET/PATH")
        return tensorstore.KvStore.open(spec).result()
    except ValueError as error:
        raise UserError(f"{url!r}: {reason_of(error)}") from None


class RemoteDirectory:
    """The files directly within ``gs://BUCKET/PATH``."""

    def __init__(self, url: str) -> None:
        """Open the directory; see :func:`open_store`."""
        self.url, self._store = url.rstrip("/"), open_store(url)

    def names(self) -> list[str]:
        """The names of the files, sorted.

        Raises:
          UserError: the directory cannot be listed, or has no files.
        """
        try:
            keys = self._store.list().result()
        except ValueError as error:
            raise failure(f"{self.url}: cannot be listed ({reason_of(error)})", error) from None
        names = sorted(key.decode(errors="replace") for key in keys)
        found = [name for name in names if name and name == PurePosixPath(name).name and name != ".."]
        if not found:
            raise UserError(f"{self.url}: no such directory, or there are no files in it")
        return found

    def content(self, name: str) -> bytes:
        """The content of a small file.

        Raises:
          UserError: the file is missing or cannot be read.
        """
        return _result(self._store.read(name), f"{self.url}/{name}").value

    def file(self, name: str) -> RemoteFile:
        """The weight file of this name."""
        return RemoteFile(self._store, self.url, name)


@dataclass(frozen=True)
class RemoteFile:
    """A safetensors file of a remote directory; see ``byte_files.ByteFile``.

    Attributes:
      store: the ``tensorstore.KvStore`` of its directory.
      url: the directory.
      key: the file's name in the directory.
    """

    store: Any
    url: str
    key: str

    block = 2**22
    """Large enough that the transfer, and not the latency of a request, takes most of the time."""

    @property
    def name(self) -> str:
        """The full URL."""
        return f"{self.url}/{self.key}"

    def size(self) -> int:
        """Bytes of the file."""
        return self._size

    @functools.cached_property
    def _size(self) -> int:
        """The size, found once.

        tensorstore does not report sizes, but a safetensors file declares its end. Two requests of one byte
        check the declared end, and only the size of a damaged file is found by bisection.
        """
        declared = self._declared_size()
        if declared is not None and self._has_bytes(declared) and not self._has_bytes(declared + 1):
            return declared
        most = LENGTH_BYTES
        while self._has_bytes(most):
            most *= 2
        return bisect.bisect_left(range(1, most), True, key=lambda count: not self._has_bytes(count))

    def read(self, spans: Iterable[Span]) -> Iterator[memoryview]:
        """The bytes of every span; the next few spans are requested in the meantime."""
        pending: deque[Any] = deque()
        for start, end in spans:
            pending.append(self.store.read(self.key, byte_range=slice(start, end)))
            if len(pending) > AHEAD:
                yield self._bytes_of(pending.popleft())
        while pending:
            yield self._bytes_of(pending.popleft())

    @functools.cached_property
    def _generation(self) -> bytes:
        """The generation of the file at the first read; an object may be replaced between two reads."""
        return _result(self.store.read(self.key, byte_range=slice(0, 1)), self.name).stamp.generation

    def _bytes_of(self, pending: Any) -> memoryview:
        found = _result(pending, self.name)
        if found.stamp.generation != self._generation:
            raise UserError(f"{self.name}: was replaced while it was read")
        return memoryview(found.value)

    def _declared_size(self) -> int | None:
        """The end of the last tensor by the header; None where the header cannot be read."""
        try:
            length = int.from_bytes(read_span(self, 0, LENGTH_BYTES), "little")
            if length > LARGEST_HEADER:
                return None
            header = parse_json_object(read_span(self, LENGTH_BYTES, LENGTH_BYTES + length), self.name)
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (UserError, LookupError, TypeError):
            return None
        return LENGTH_BYTES + length + end if type(end) is int and end >= 0 else None

    def _has_bytes(self, count: int) -> bool:
        """Whether the file has at least so many bytes."""
        if count > LARGEST_FILE:
            return False
        try:
            self.store.read(self.key, byte_range=slice(count - 1, count)).result()
        except ValueError as error:
            if str(error).startswith(OUT_OF_RANGE):
                return False
            raise failure(f"{self.name}: {reason_of(error)}", error) from None
        return True


def _result(pending: Any, name: str) -> Any:
    """The ``ReadResult`` of a pending read.

    Raises:
      UserError: the object is missing, shorter than the range, or cannot be read.
    """
    try:
        found = pending.result()
    except ValueError as error:
        reason = (
            "ends where there were more bytes" if str(error).startswith(OUT_OF_RANGE) else reason_of(error)
        )
        raise failure(f"{name}: {reason}", error) from None
    if found.state != "value":
        raise UserError(f"{name}: not there")
    return found


def failure(line: str, error: Exception) -> UserError:
    """The error to raise for one of tensorstore: temporary if it gave up trying, final if it was refused."""
    return (TemporaryError if str(error).startswith(GAVE_UP) else UserError)(line)


def reason_of(error: Exception) -> str:
    """The first line of an error of tensorstore, without the body of the answer that it quotes."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return _BODY.sub("", line)
