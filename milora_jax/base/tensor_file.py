"""safetensors files read by byte ranges, and as if they were hostile.

The library maps a file into memory, where every page that was read counts as the process's own, and a file
that is cut meanwhile kills the process. Here a header is checked to the last byte before anything else is
believed, and tensors are read in chunks, from as many threads as like to.

The format: eight bytes, the length of the header, little end first; the header, a JSON object that gives
every tensor's dtype, shape and place; the tensors, without gaps (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax.numpy as jnp
import numpy as np

from milora_jax.base.byte_files import ByteFile, read_span
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


def declared_bytes(text: bytes) -> int | None:
    """Where the last tensor ends, in bytes behind the header, if the header says so; it is not checked."""
    try:
        header = parse_json_object(text, "header")
    except UserError:
        return None
    ends = [0]
    for name, values in header.items():
        span = values.get("data_offsets") if isinstance(values, dict) else None
        if name != "__metadata__" and isinstance(span, list) and span and type(span[-1]) is int:
            ends.append(span[-1])
    return max(ends)


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
      file: its bytes.
      entries: its tensors.
    """

    file: ByteFile
    entries: dict[str, Entry]

    @property
    def name(self) -> str:
        """What errors call the file."""
        return self.file.name

    @classmethod
    def of(cls, file: ByteFile) -> TensorFile:
        """A file, checked.

        Raises:
          UserError: it is not readable, not a regular file, or damaged.
        """
        size = file.size()
        length = header_length(read_span(file, 0, min(LENGTH_BYTES, size)), size, file.name)
        text = read_span(file, LENGTH_BYTES, LENGTH_BYTES + length)
        return cls(file, parse_header(text, size, file.name))

    def chunks(self, name: str, first: int, end: int) -> Iterator[tuple[int, np.ndarray]]:
        """Some rows of a tensor with a floating dtype, chunk by chunk, each until the next is asked for.

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
        starts = range(first, end, max(1, self.file.block // row))
        ends = [*starts[1:], end]
        spans = (
            (entry.start + start * row, entry.start + stop * row)
            for start, stop in zip(starts, ends, strict=True)
        )
        for start, raw in zip(starts, self.file.read(spans), strict=True):
            yield start, np.frombuffer(raw, np.uint8).view(dtype).reshape(-1, *rest)

    def whole(self, name: str) -> np.ndarray:
        """All of a tensor with a floating dtype."""
        entry = self.entries[name]
        values = np.empty(entry.shape, jnp.dtype(FLOATING[entry.dtype]))
        for start, chunk in self.chunks(name, 0, entry.shape[0]):
            values[start : start + len(chunk)] = chunk
        return values
