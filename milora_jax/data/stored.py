"""Examples in files, for data sets that do not fit into memory: written one by one, read by number.

``NAME.tokens`` holds the ids of all examples one after the other, ``NAME.index`` the rest of each in
:data:`COLUMNS`, ``NAME.answers`` where answers begin and end. It is our own form because the Arrow files of
``datasets`` take many times as long to write and to read by random numbers (docs/scaling.md), and the core
does without that package. ``pread`` reads the tokens instead of a memory map: a file that was truncated is a
clear error and no crash, and pages that were read do not count as this process's memory.
"""

from __future__ import annotations

import os
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, SupportsIndex, overload

import numpy as np

from milora_jax.data.tokens import Example
from milora_jax.errors import UserError

COLUMNS = np.dtype(
    [
        ("end", "<i8"),
        ("answers_end", "<i8"),
        ("prompt_length", "<i4"),
        ("route_tokens", "<i4"),
        ("source", "<i4"),
        ("label", "<i4"),
        ("crc", "<u4"),
    ]
)
"""What is kept of an example beside its tokens, whose CRC-32 is ``crc``. ``end`` and ``answers_end`` say
where its tokens and answers end among those of all examples."""

TOKENS, INDEX, ANSWERS = ".tokens", ".index", ".answers"


class ExampleWriter:
    """The files of one sequence of examples, see :func:`writing`.

    Attributes:
      count: number of examples so far.
    """

    def __init__(self, files: Sequence[IO[bytes]], sources: Sequence[str]) -> None:
        self._tokens, self._index, self._answers = files
        self._sources = {source: number for number, source in enumerate(sources)}
        self._end = self._answers_end = self.count = 0

    def append(self, example: Example) -> None:
        """Write one example.

        Raises:
          OSError: the disk is full, ...
        """
        ids = example.tokens.astype("<i4").tobytes()
        self._end += len(example.tokens)
        self._answers_end += len(example.answers)
        place = self._sources[example.source]
        column = (self._end, self._answers_end, example.prompt_length, example.route_tokens, place)
        column = (*column, example.label)
        self._tokens.write(ids)
        self._answers.write(np.array(example.answers, "<i4").tobytes())
        self._index.write(np.array((*column, zlib.crc32(ids)), COLUMNS).tobytes())
        self.count += 1


@contextmanager
def writing(directory: Path, name: str, sources: Sequence[str]) -> Iterator[ExampleWriter]:
    """Open new files ``NAME.*`` in a directory for the ``with`` block.

    Args:
      sources: every name that the examples' ``source`` has.
    """
    with ExitStack() as stack:
        kinds = (TOKENS, INDEX, ANSWERS)
        files = [stack.enter_context(open(directory / f"{name}{kind}", "xb")) for kind in kinds]
        yield ExampleWriter(files, sources)


class StoredExamples(Sequence[Example]):
    """Examples that are read from the file when they are asked for.

    Attributes:
      lengths: tokens of each example.
    """

    def __init__(self, path: Path, index: bytes, answers: bytes, sources: Sequence[str]) -> None:
        """Open the tokens.

        Args:
          path: the file of the tokens.
          index, answers: content of the other two files.
          sources: as they were written.

        Raises:
          OSError: the file cannot be opened.
        """
        self._path, self._sources = path, sources
        self._index = np.frombuffer(index, COLUMNS)
        self._answers = np.frombuffer(answers, "<i4").reshape(-1, 2)
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self.lengths = np.diff(self._index["end"], prepend=0)

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, place: SupportsIndex) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: SupportsIndex | slice) -> Example | list[Example]:
        """Read one example, or several.

        Raises:
          UserError: the file no longer holds what was written.
        """
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        number = range(len(self))[place]
        end, answers_end, prompt_length, route_tokens, source, label, crc = self._index[number].item()
        length = int(self.lengths[number])
        ids = self._read(4 * length, 4 * (end - length))
        if zlib.crc32(ids) != crc:
            raise UserError(
                f"{self._path} is damaged: the tokens of example {number} are not those that were written: "
                f"remove {str(self._path.parent)!r}, which is made again"
            )
        first = int(self._index["answers_end"][number - 1]) if number else 0
        answers = self._answers[first:answers_end].tolist()
        return Example(
            tokens=np.frombuffer(ids, "<i4"),
            prompt_length=prompt_length,
            source=str(self._sources[source]),
            route_tokens=route_tokens,
            answers=tuple((begin, end) for begin, end in answers),
            label=bool(label),
        )

    def source_numbers(self, places: Mapping[str, int]) -> np.ndarray:
        """The place of each example's source.

        Args:
          places: of every source that an example has.
        """
        mapped = np.array([places.get(str(name), -1) for name in self._sources], np.int32)
        return mapped[self._index["source"]]

    def _read(self, size: int, offset: int) -> bytes:
        try:
            return os.pread(self._descriptor, size, offset)
        except OSError as error:
            raise UserError(f"{self._path}: not readable ({error.strerror})") from None
