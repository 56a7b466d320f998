"""safetensors files read by byte ranges, and as if they were hostile.

The library maps a file into memory, where every page that was read counts as the process's own, and a file
that is cut meanwhile kills the process. Here a header is checked to the last byte before anything else is
believed, and tensors are read in chunks, from as many threads as like to.

The format: eight bytes, the length of the header, little end first; the header, a JSON object that gives
every tensor's dtype, shape and place; the tensors, without gaps (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from milora_jax.base.json_files import parse_json_object
from milora_jax.errors import UserError

FLOATING = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The floating dtypes of safetensors that are read, and NumPy's names of them."""

BYTES = {
    **{name: np.dtype(jnp.dtype(kind)).itemsize for name, kind in FLOATING.items()},
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16"), 2),
    **dict.fromkeys(("U32", "I32"), 4),
    **dict.fromkeys(("U64", "I64"), 8),
}
"""Bytes of a number of every dtype."""

LENGTH_BYTES = 8

LARGEST_HEADER = 100_000_000
"""Bytes of the largest header, as in the safetensors library."""

LONGEST_NAME, MOST_AXES = 256, 8

CHUNK_BYTES = 2**19
"""Read at a time: enough for a disk, and what is read is still in the cache when it is copied on."""


@dataclass(frozen=True)
class Entry:
    """What a header says of a tensor.

    Attributes:
      dtype: safetensors' name of it.
      start, end: its bytes in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.start


def header_length(first: bytes, size: int, where: str) -> int:
    """Bytes of the header of a file.

    Args:
      first: its first bytes, eight if it has so many.
      size: of the file.
      where: what an error calls it.

    Raises:
      UserError: the file cannot hold such a header.
    """
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    if len(first) < LENGTH_BYTES or length > min(LARGEST_HEADER, size - LENGTH_BYTES):
        found = f"{length} bytes in a file of {size}" if len(first) >= LENGTH_BYTES else f"{len(first)} bytes"
        raise UserError(f"{where}: not a whole safetensors file: its header has {found}")
    return length


def parse_header(text: bytes, size: int, where: str) -> dict[str, Entry]:
    """The tensors of a file by name, in the order of their places.

    Args:
      text: of the header.
      size: of the file.
      where: what an error calls it.

    Raises:
      UserError: the header does not describe the file to its last byte, or has an empty tensor in it.
    """
    header = parse_json_object(text, f"{where}: header")
    header.pop("__metadata__", None)
    begin = LENGTH_BYTES + len(text)
    entries = {}
    for name, values in header.items():
        if len(name) > LONGEST_NAME:
            raise UserError(
                f"{where}: a tensor's name has {len(name)} characters, expected at most {LONGEST_NAME}"
            )
        what = f"{where}: tensor {name!r}"
        dtype, shape, (start, end) = _checked(values, what)
        expected = math.prod(shape) * BYTES[dtype]
        if end - start != expected:
            raise UserError(f"{what} of shape {list(shape)} has {end - start} bytes, expected {expected}")
        if begin + end > size:
            raise UserError(
                f"{where}: truncated: tensor {name!r} ends at {end} of {size - begin} bytes of data"
            )
        entries[name] = Entry(dtype, shape, begin + start, begin + end)
    ordered = sorted(entries.items(), key=lambda pair: (pair[1].start, pair[1].end))
    for (before, one), (name, other) in pairwise(ordered):
        if other.start != one.end:
            kind = "overlap" if other.start < one.end else "leave a gap"
            edges = f"{one.end - begin} and {other.start - begin}"
            raise UserError(f"{where}: tensors {before!r} and {name!r} {kind}: {edges}")
    if ordered and ordered[0][1].start != begin:
        name, entry = ordered[0]
        raise UserError(
            f"{where}: {entry.start - begin} bytes before the first tensor {name!r}, expected none"
        )
    end = ordered[-1][1].end if ordered else begin
    if end != size:
        raise UserError(f"{where}: {size - end} trailing bytes after the last tensor, expected none")
    return dict(ordered)


def _checked(values: Any, what: str) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """Dtype, shape and place of one tensor."""
    if not isinstance(values, dict) or values.keys() != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{what}: expected dtype, shape and data_offsets")
    dtype, shape, span = values["dtype"], values["shape"], values["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise UserError(f"{what} has dtype {dtype!r}, expected one of {', '.join(BYTES)}")
    for field, value, most in (("shape", shape, MOST_AXES), ("data_offsets", span, 2)):
        if not isinstance(value, list) or len(value) > most:
            raise UserError(f"{what}: {field} is no list of at most {most} numbers")
        if any(type(number) is not int or number < 0 for number in value):
            raise UserError(f"{what} has {field} {value!r}, expected whole numbers")
    if 0 in shape:
        raise UserError(f"{what} has shape {shape}, expected no empty axis")
    if len(span) != 2 or span[0] > span[1]:
        raise UserError(f"{what} has data_offsets {span}, expected a start and an end")
    return dtype, tuple(shape), (span[0], span[1])


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header has been checked.

    Attributes:
      path: of the file, which is opened anew by every reader.
      entries: its tensors.
    """

    path: Path
    entries: dict[str, Entry]

    @classmethod
    def at(cls, path: Path) -> TensorFile:
        """The file at ``path``.

        Raises:
          UserError: it is not readable, not a regular file, or damaged.
        """
        descriptor = _opened(path)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{path}: not a regular file")
            first = os.pread(descriptor, LENGTH_BYTES, 0)
            length = header_length(first, status.st_size, str(path))
            text = os.pread(descriptor, length, LENGTH_BYTES)
            return cls(path, parse_header(text, status.st_size, str(path)))
        finally:
            os.close(descriptor)

    def chunks(self, name: str, first: int, end: int) -> Iterator[tuple[int, np.ndarray]]:
        """Some rows of a tensor with a floating dtype, chunk by chunk, each in the same memory.

        Args:
          first, end: the rows, along the tensor's first axis.

        Yields:
          The first row of a chunk, and its values in the dtype of the file.

        Raises:
          UserError: the file has become shorter.
        """
        entry = self.entries[name]
        dtype, (_, *rest) = jnp.dtype(FLOATING[entry.dtype]), entry.shape
        row = math.prod(rest) * dtype.itemsize
        count = max(1, CHUNK_BYTES // row)
        buffer = np.empty((min(count, end - first), *rest), dtype)
        raw = buffer.view(np.uint8).reshape(-1).data
        descriptor = _opened(self.path)
        try:
            for start in range(first, end, count):
                rows = min(count, end - start)
                self._fill(descriptor, raw[: rows * row], entry.start + start * row, name)
                yield start, buffer[:rows]
        finally:
            os.close(descriptor)

    def whole(self, name: str) -> np.ndarray:
        """All of a tensor with a floating dtype."""
        entry = self.entries[name]
        values = np.empty(entry.shape, jnp.dtype(FLOATING[entry.dtype]))
        for start, chunk in self.chunks(name, 0, entry.shape[0]):
            values[start : start + len(chunk)] = chunk
        return values

    def _fill(self, descriptor: int, into: memoryview, offset: int, name: str) -> None:
        while into:
            got = os.preadv(descriptor, [into], offset)
            if got == 0:
                raise UserError(f"{self.path}: truncated while tensor {name!r} was read")
            into, offset = into[got:], offset + got


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for a writer
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror})") from None
