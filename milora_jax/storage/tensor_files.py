"""Adapter tensors in safetensors files: written plainly, read as if the file were hostile.

A file is read into memory once, through a descriptor that follows no symbolic link, and never mapped:
whoever owns the directory may replace the file while it is read. Beyond what the safetensors library
refuses, names must be unique and no tensor may be empty or hold a value that is not finite.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from milora_jax.errors import UserError
from milora_jax.storage.files import parse_json_object, read_bytes

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The dtypes of safetensors that an adapter may have, and NumPy's names of them."""

LARGEST_HEADER = 100_000_000
"""Bytes of the largest header, as in the safetensors library."""

LONGEST_NAME = 256
MOST_AXES = 8


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, by name; see :func:`parse_tensors`."""
    return parse_tensors(read_bytes(path), str(path))


def parse_tensors(content: bytes, where: str) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file's content, by name, in the dtypes of the file.

    Args:
      where: what an error calls the file.

    Raises:
      UserError: it is no safetensors file to the last byte, or a tensor is empty, of another dtype than
        those of :data:`DTYPES`, or not finite.
    """
    header, data = _header(content, where)
    spans, tensors = [], {}
    for name, entry in header.items():
        if len(name) > LONGEST_NAME:
            raise UserError(
                f"{where}: a tensor's name has {len(name)} characters, expected at most {LONGEST_NAME}"
            )
        dtype, shape, span = _entry(entry, f"{where}: tensor {name!r}")
        size = math.prod(shape) * dtype.itemsize
        start, end = span
        if end - start != size:
            raise UserError(
                f"{where}: tensor {name!r} of shape {list(shape)} has {end - start} bytes, expected {size}"
            )
        if end > len(data):
            raise UserError(f"{where}: truncated: tensor {name!r} ends at {end} of {len(data)} bytes of data")
        spans.append((start, end, name))
    spans.sort()
    for (_, end, before), (start, _, name) in pairwise(spans):
        if start != end:
            kind = "overlap" if start < end else "leave a gap"
            raise UserError(f"{where}: tensors {before!r} and {name!r} {kind}: {end} and {start}")
    first, last = (spans[0][0], spans[-1][1]) if spans else (0, 0)
    if first != 0:
        raise UserError(f"{where}: {first} bytes before the first tensor {spans[0][2]!r}, expected none")
    if last != len(data):
        raise UserError(f"{where}: {len(data) - last} trailing bytes after the last tensor, expected none")
    for start, end, name in spans:
        dtype, shape, _ = _entry(header[name], where)
        values = np.frombuffer(data[start:end], dtype).reshape(shape)
        if not np.isfinite(values.astype(np.float32) if dtype.itemsize == 2 else values).all():
            raise UserError(f"{where}: tensor {name!r} holds values that are not finite")
        tensors[name] = values
    return tensors


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file that torch's readers take as well."""
    from safetensors.numpy import save

    plain = {name: np.ascontiguousarray(value) for name, value in sorted(tensors.items())}
    path.write_bytes(save(plain, metadata={"format": "pt"}))


def _header(content: bytes, where: str) -> tuple[dict[str, Any], memoryview]:
    """What the header says of each tensor, and the bytes after it."""
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or size > min(LARGEST_HEADER, len(content) - 8):
        found = f"{size} bytes in a file of {len(content)}" if len(content) >= 8 else f"{len(content)} bytes"
        raise UserError(f"{where}: not a whole safetensors file: its header has {found}")
    header = parse_json_object(content[8 : 8 + size], f"{where}: header")
    header.pop("__metadata__", None)
    return header, memoryview(content)[8 + size :]


def _entry(entry: Any, what: str) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    """Dtype, shape and place of one tensor."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{what}: expected dtype, shape and data_offsets")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{what} has dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    for field, value, most in (("shape", shape, MOST_AXES), ("data_offsets", span, 2)):
        if not isinstance(value, list) or len(value) > most:
            raise UserError(f"{what}: {field} is no list of at most {most} numbers")
        if any(type(number) is not int or number < 0 for number in value):
            raise UserError(f"{what} has {field} {value!r}, expected whole numbers")
    if 0 in shape:
        raise UserError(f"{what} has shape {shape}, expected no empty axis")
    if len(span) != 2 or span[0] > span[1]:
        raise UserError(f"{what} has data_offsets {span}, expected a start and an end")
    return jnp.dtype(DTYPES[dtype]), tuple(shape), (span[0], span[1])
