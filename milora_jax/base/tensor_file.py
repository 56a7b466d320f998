"""safetensors files, read by byte ranges and checked as if they were hostile.

This is read by hand because ``safetensors.safe_open``, whose slices go into ``jax.make_array_from_callback``,
takes 1.7 to 3 times as long and twice the peak memory (1.1 GB of bfloat16 on two EPYC cores: 2.1 times the
model against 1.01): it maps the file, every page that was read counts as the process's own, and a file that
is cut meanwhile kills the process. Here the header is checked to the last byte before anything else is
trusted, and tensors are read in chunks, from any number of threads, from a disk or a bucket.

The format: eight bytes, the length of the header, little-endian; the header, a JSON object with the dtype,
shape and place of every tensor; the tensors, without gaps (https://github.com/huggingface/safetensors).
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
"""The floating dtypes that can be read: safetensors' names and NumPy's."""

BYTES = {
    **{name: np.dtype(jnp.dtype(kind)).itemsize for name, kind in FLOATING.items()},
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16"), 2),
    **dict.fromkeys(("U32", "I32"), 4),
    **dict.fromkeys(("U64", "I64"), 8),
}
"""Bytes of one number of each dtype of safetensors."""

LENGTH_BYTES = 8

LARGEST_HEADER = 100_000_000
"""Bytes of the largest header that is accepted, as in the safetensors library."""

LONGEST_NAME, MOST_AXES = 256, 8


@dataclass(frozen=True)
class Entry:
    """The header's description of one tensor.

    Attributes:
      dtype: safetensors' name of the dtype.
      start, end: the tensor's bytes in the file.
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
      first: the first bytes of the file, eight if it has so many.
      size: bytes of the file.
      where: the file's name in errors.

    Raises:
      UserError: the file cannot have such a header.
    """
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    if len(first) < LENGTH_BYTES or length > min(LARGEST_HEADER, size - LENGTH_BYTES):
        found = f"{length} bytes in a file of {size}" if len(first) >= LENGTH_BYTES else f"{len(first)} bytes"
        raise UserError(f"{where}: not a whole safetensors file: its header has {found}")
    return length


def parse_header(text: bytes, size: int, where: str) -> dict[str, Entry]:
    """The tensors of a file by name, in the order of their bytes.

    Args:
      text: the header.
      size: bytes of the file.
      where: the file's name in errors.

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
      file: the source of its bytes.
      entries: its tensors by name.
    """

    file: ByteFile
    entries: dict[str, Entry]

    @property
    def name(self) -> str:
        """The file's name in errors."""
        return self.file.name

    @classmethod
    def of(cls, file: ByteFile) -> TensorFile:
        """Read and check the header of a file.

        Raises:
          UserError: the file is not readable, not a regular file, or damaged.
        """
        size = file.size()
        length = header_length(read_span(file, 0, min(LENGTH_BYTES, size)), size, file.name)
        text = read_span(file, LENGTH_BYTES, LENGTH_BYTES + length)
        return cls(file, parse_header(text, size, file.name))

    def chunks(self, name: str, first: int, end: int) -> Iterator[tuple[int, np.ndarray]]:
        """Rows of a tensor with a floating dtype, chunk by chunk; the next chunk may overwrite the last one.

        Args:
          first, end: the range of rows along the tensor's first axis.

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
        """A whole tensor with a floating dtype."""
        entry = self.entries[name]
        values = np.empty(entry.shape, jnp.dtype(FLOATING[entry.dtype]))
        for start, chunk in self.chunks(name, 0, entry.shape[0]):
            values[start : start + len(chunk)] = chunk
        return values
