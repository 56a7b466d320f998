"""Adapter tensors in safetensors files: written plainly, read as if the file were hostile.

A file is read into memory once, through a descriptor that follows no symbolic link, and never mapped, because
the owner of the directory may replace the file while it is read. Beyond what the safetensors library refuses,
names must be unique and no tensor may be empty or hold a value that is not finite.
"""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from milora_jax.base.tensor_file import FLOATING, LENGTH_BYTES, header_length, parse_header
from milora_jax.errors import UserError
from milora_jax.storage.files import read_bytes


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read the tensors of a safetensors file by name; see :func:`parse_tensors`."""
    return parse_tensors(read_bytes(path), str(path))


def parse_tensors(content: bytes, where: str) -> dict[str, np.ndarray]:
    """Parse the content of a safetensors file into tensors by name, in the dtypes of the file.

    Args:
      where: the file's name in errors.

    Raises:
      UserError: the content is not exactly a safetensors file, or a tensor is empty, not finite, or of a
        dtype that is not in ``FLOATING``.
    """
    length = header_length(content, len(content), where)
    entries = parse_header(content[LENGTH_BYTES : LENGTH_BYTES + length], len(content), where)
    for name, entry in entries.items():
        if entry.dtype not in FLOATING:
            raise UserError(
                f"{where}: tensor {name!r} has dtype {entry.dtype!r}, expected one of {', '.join(FLOATING)}"
            )
    tensors = {}
    for name, entry in entries.items():
        dtype = jnp.dtype(FLOATING[entry.dtype])
        values = np.frombuffer(memoryview(content)[entry.start : entry.end], dtype).reshape(entry.shape)
        if not np.isfinite(values.astype(np.float32) if dtype.itemsize == 2 else values).all():
            raise UserError(f"{where}: tensor {name!r} holds values that are not finite")
        tensors[name] = values
    return tensors


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file that torch can read too."""
    from safetensors.numpy import save

    plain = {name: np.ascontiguousarray(value) for name, value in sorted(tensors.items())}
    path.write_bytes(save(plain, metadata={"format": "pt"}))
