"""The objects below ``gs://BUCKET/PATH``, read and written whole.

tensorstore's key-value store makes the requests, as for bases (``base/gcs.py``). An upload that has succeeded
is durable, and readers see the former object or the new one. A *generation* names one version of an object,
or its absence; a write may be conditional on it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from milora_jax.addresses import BUCKETS
from milora_jax.base.gcs import failure, open_store, reason_of
from milora_jax.errors import UserError

AT_ONCE = 4
"""Objects that are transferred at a time, which bounds the memory: each is held whole."""


class Version(NamedTuple):
    """A version of an object.

    Attributes:
      content: None where there is no object.
      generation: opaque; what a conditional write expects.
    """

    content: bytes | None
    generation: bytes


class Bucket:
    """The objects below an address; names are relative to it."""

    def __init__(self, url: str) -> None:
        """Open it, without a request.

        Raises:
          UserError: the address is malformed, or names a bucket without a path in it.
        """
        self.url = url.rstrip("/")
        if url.startswith(BUCKETS) and not self.url.removeprefix(BUCKETS).partition("/")[2]:
            raise UserError(f"{url!r}: expected {BUCKETS}BUCKET/PATH")
        self._store = open_store(url)

    def names(self, below: str = "") -> list[str]:
        """The names of all objects that begin with ``below``, sorted; without the markers of empty folders.

        Raises:
          UserError: they cannot be listed.
        """
        import tensorstore

        end = below[:-1] + chr(ord(below[-1]) + 1) if below else ""
        keys = self._done(self._store.list(tensorstore.KvStore.KeyRange(below, end)), "", "cannot be listed")
        names = sorted(key.decode(errors="replace") for key in keys)
        return [name for name in names if name and not name.endswith("/")]

    def read(self, name: str) -> Version:
        """The newest version of an object.

        Raises:
          UserError: it cannot be read.
        """
        return self._version(self._store.read(name), name)

    def read_all(self, names: Iterable[str]) -> Iterator[tuple[str, Version]]:
        """The newest versions of several objects, in order; the next few are requested in the meantime.

        Raises:
          UserError: one cannot be read.
        """
        pending: deque[tuple[str, Any]] = deque()
        for name in names:
            pending.append((name, self._store.read(name)))
            if len(pending) >= AT_ONCE:
                first, future = pending.popleft()
                yield first, self._version(future, first)
        for name, future in pending:
            yield name, self._version(future, name)

    def write(self, name: str, content: bytes | None, expected: bytes | None = None) -> bytes | None:
        """Replace an object, or delete it.

        Args:
          content: None deletes.
          expected: the generation that must be the newest; None for any.

        Returns:
          The new generation; None if the newest was not the expected one, and nothing was written.

        Raises:
          UserError: the bucket refuses, or cannot be reached.
        """
        what = "cannot be deleted" if content is None else "cannot be written"
        future = self._store.write(name, content, if_equal=expected)
        generation = self._done(future, name, what).generation or None
        if generation is None:
            # The answer to an attempt that had succeeded may be lost, so that the next one found its result.
            newest = self.read(name)
            generation = newest.generation if newest.content == content else None
        return generation

    def write_all(self, contents: Iterable[tuple[str, bytes | None]]) -> None:
        """Replace or delete several objects, a few at a time.

        Raises:
          UserError: one cannot be written; others may be.
        """
        pending: deque[tuple[str, Any]] = deque()
        try:
            for name, content in contents:
                pending.append((name, self._store.write(name, content)))
                if len(pending) >= AT_ONCE:
                    first, future = pending.popleft()
                    self._done(future, first, "cannot be written")
        finally:
            # None may reach the bucket after the caller has gone on.
            errors = []
            for name, future in pending:
                try:
                    self._done(future, name, "cannot be written")
                except UserError as error:
                    errors.append(error)
        if errors:
            raise errors[0]

    def _version(self, future: Any, name: str) -> Version:
        found = self._done(future, name, "cannot be read")
        return Version(bytes(found.value) if found.state == "value" else None, found.stamp.generation)

    def _done(self, future: Any, name: str, what: str) -> Any:
        try:
            return future.result()
        except ValueError as error:
            where = f"{self.url}/{name}" if name else self.url
            raise failure(f"{where} {what}: {reason_of(error)}", error) from None
