"""Files that are read by byte ranges: the protocol, and a file on a disk."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from milora_jax.errors import UserError

Span = tuple[int, int]
"""A first byte, and the byte after the last."""


@runtime_checkable
class ByteFile(Protocol):
    """A file that any number of threads read by byte ranges."""

    @property
    def name(self) -> str:
        """The file's name in errors."""
        ...

    @property
    def block(self) -> int:
        """Bytes to read at a time."""
        ...

    def size(self) -> int:
        """Bytes of the file.

        Raises:
          UserError: the file is missing, not readable, or not a regular file.
        """
        ...

    def read(self, spans: Iterable[Span]) -> Iterator[memoryview]:
        """The bytes of every span, in order; each is valid until the next one is taken.

        Raises:
          UserError: the file is not readable, or ends within a span.
        """
        ...


@dataclass(frozen=True)
class LocalFile:
    """A file on a disk, which every call opens anew."""

    path: Path

    block = 2**20
    """Large enough for a disk, and small enough that the bytes are copied from the processor's cache."""

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def size(self) -> int:
        """Bytes of the file; UserError for a pipe, a directory or a missing file."""
        descriptor = self._open()
        try:
            status = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{self.path}: not a regular file")
        return status.st_size

    def read(self, spans: Iterable[Span]) -> Iterator[memoryview]:
        """The bytes of every span, in one buffer that is reused."""
        memory = bytearray(0)
        descriptor = self._open()
        try:
            for start, end in spans:
                if len(memory) < end - start:
                    memory = bytearray(end - start)
                view = memoryview(memory)[: end - start]
                self._fill(descriptor, view, start)
                yield view
        finally:
            os.close(descriptor)

    def _fill(self, descriptor: int, into: memoryview, offset: int) -> None:
        while into:
            got = os.preadv(descriptor, [into], offset)
            if got == 0:
                raise UserError(f"{self.path}: ends at byte {offset}, where there were more")
            into, offset = into[got:], offset + got

    def _open(self) -> int:
        try:
            # Otherwise opening a pipe would wait for its writer.
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise UserError(f"{self.path}: not readable ({error.strerror})") from None


def read_span(file: ByteFile, start: int, end: int) -> bytes:
    """The bytes of one span."""
    spans = [(start, end)] if start < end else []
    return b"".join(bytes(part) for part in file.read(spans))
