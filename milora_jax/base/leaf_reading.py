"""Tensors of safetensors files into the leaves of a base, by several threads.

A chunk of a file is cast or encoded, transposed to ``[in, out]``, and copied into its place. Beside the
buffers each of :data:`THREADS` threads holds one chunk; for a quantised kernel one tensor in float32; and one
tensor where devices take a leaf tensor by tensor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from milora_jax.base.leaf_buffers import Box, Buffer
from milora_jax.base.specs import Encoded, LeafSpec, Part
from milora_jax.base.tensor_file import FLOATING, TensorFile
from milora_jax.errors import UserError

THREADS = 4
"""Tensors that are read at a time."""

PIECE_BYTES = 2**25
"""The smallest piece of a tensor that is divided among threads."""

TRANSPOSED_ROWS = 16
"""Rows that are transposed together. With more of them, a processor's cache loses the first row before the
last is copied: two EPYC cores transpose 1.5 GB/s so, and 0.3 where a tensor is transposed at once."""

Scales = dict[tuple[str, int, int], np.ndarray]
"""Scales of the kernel read last, by the tensor's name, its first column and the column after its last."""

Task = Callable[[], int]

Placed = Sequence[tuple[Box, Buffer]]
"""Boxes of a leaf, each with the buffer that its values go to."""


@dataclass(frozen=True)
class Source:
    """A tensor to read from.

    Attributes:
      shape: the shape that it must have, in the axis order of the leaf.
      transposed: whether the file holds it ``[out, in]``.
    """

    file: TensorFile
    name: str
    shape: tuple[int, ...]
    transposed: bool


def fill(
    spec: LeafSpec,
    placed: Placed,
    files: Mapping[str, TensorFile],
    scales: Scales,
    pool: Executor,
    note: Callable[[int], None],
) -> None:
    """Read the values of a leaf within boxes.

    Args:
      files: the file of every tensor.
      scales: reading the codes of a kernel adds its scales, which reading the scales removes.
      pool: the threads that read.
      note: called by this thread with the bytes of every tensor or piece that has been put.

    Raises:
      UserError: a tensor is damaged or misshapen; the error names it.
    """
    encoded = spec.encoded
    if encoded is None:
        tasks = _plain_tasks(spec, placed, files)
    else:
        tasks = _encoded_tasks(spec, encoded, placed, files, scales)
    # The first error is raised here, when its result is taken.
    for size in pool.map(lambda task: task(), tasks):
        note(size)


def _source(spec: LeafSpec, part: Part, files: Mapping[str, TensorFile]) -> Source:
    return Source(files[part.name], part.name, spec.tensor_shape(part), spec.transposed)


def _plain_tasks(spec: LeafSpec, placed: Placed, files: Mapping[str, TensorFile]) -> Iterator[Task]:
    """One task for every tensor, or for some rows of it; each returns the bytes it has put."""

    def read(source: Source, buffer: Buffer, place: Box, mine: Box) -> int:
        region = buffer.region(place)
        read_slices(region[(0,) * (region.ndim - len(mine))], source, mine)
        buffer.put(place, region)
        return region.nbytes

    for part in spec.parts:
        source = _source(spec, part, files)
        for box, buffer in placed:
            found = part.within(box)
            if found is not None:
                for place, mine in _pieces(*found, spec.transposed, buffer.dtype.itemsize):
                    yield functools.partial(read, source, buffer, place, mine)


def _pieces(place: Box, mine: Box, transposed: bool, itemsize: int) -> Iterator[tuple[Box, Box]]:
    """Divide a part of a tensor by rows of the file: a leaf may consist of one large tensor."""
    axis = len(mine) - 1 if transposed else 0
    rows, front = mine[axis], len(place) - len(mine)
    size = math.prod(side.stop - side.start for side in mine) * itemsize
    count = max(1, min(THREADS, size // PIECE_BYTES))
    edges = [(rows.stop - rows.start) * i // count for i in range(count + 1)]
    for first, end in pairwise(edges):
        yield _with_side(place, front + axis, first, end), _with_side(mine, axis, first, end)


def _with_side(box: Box, axis: int, first: int, end: int) -> Box:
    """A box cut down to a range of rows, which are counted from its first row."""
    start = box[axis].start
    return (*box[:axis], slice(start + first, start + end), *box[axis + 1 :])


def _encoded_tasks(
    spec: LeafSpec, encoded: Encoded, placed: Placed, files: Mapping[str, TensorFile], scales: Scales
) -> Iterator[Task]:
    """One task for every tensor: all rows of a quantised kernel's columns are read, once."""

    def encode(part: Part) -> int:
        source, size = _source(spec, part, files), 0
        columns: dict[tuple[int, int], np.ndarray] = {}  # for boxes of any rows
        for box, buffer in placed:
            found, read = part.within(box), part.within(spec.rows_read(box))
            if found is None or read is None:
                continue
            ends = (read[1][-1].start, read[1][-1].stop)
            if ends not in columns:
                columns[ends] = _encoded(encoded, source, read[1], scales)
            values = columns[ends][box[-2]]
            buffer.put(found[0], values[(None,) * (len(box) - values.ndim)])
            size += values.nbytes
        return size

    for part in spec.parts:
        yield functools.partial(encode, part)


def _encoded(encoded: Encoded, source: Source, mine: Box, scales: Scales) -> np.ndarray:
    """Codes or scales of whole columns of a tensor. The codes come first, and store the scales."""
    key = (source.name, mine[-1].start, mine[-1].stop)
    if encoded.scales:
        return scales.pop(key)
    plain = np.empty([side.stop - side.start for side in mine], np.float32)
    read_slices(plain, source, mine)
    if not np.isfinite(plain).all():
        raise UserError(f"{source.file.name}: tensor {source.name!r} has a value that is not finite")
    scales[key] = encoded.scheme.scales_of(plain)
    return encoded.scheme.codes_of(plain, scales[key])


def read_slices(into: np.ndarray, source: Source, mine: Box) -> None:
    """Copy slices of one tensor to ``into``, after a check of its shape and its dtype.

    Args:
      mine: the slices, one per axis, in the axis order of the leaf.
    """
    order = -1 if source.transposed else 1
    file, name = source.file, source.name
    entry, shape = file.entries[name], source.shape[::order]
    if entry.shape != shape:
        raise UserError(f"{file.name}: tensor {name!r} has shape {entry.shape}, expected {shape}")
    if entry.dtype not in FLOATING:
        raise UserError(f"{file.name}: tensor {name!r} has dtype {entry.dtype}, expected a floating type")
    rows, *rest = mine[::order]
    for start, chunk in file.chunks(name, rows.start, rows.stop):
        with np.errstate(over="ignore", invalid="ignore"):
            values = chunk[(slice(None), *rest)].astype(into.dtype, copy=False)
        at = start - rows.start
        if source.transposed:
            _copy_transposed(values, into[:, at : at + len(values)])
        else:
            into[at : at + len(values)] = values


def _copy_transposed(rows: np.ndarray, into: np.ndarray) -> None:
    for i in range(0, len(rows), TRANSPOSED_ROWS):
        few = rows[i : i + TRANSPOSED_ROWS]
        into[:, i : i + len(few)] = few.T
