"""Tensors of safetensors files into the leaves of a base, by several threads.

A chunk of a file is transposed to ``[in, out]``, cast or encoded, and copied into its place. Beside the
buffers each of :data:`THREADS` holds a chunk: of a quantised kernel one tensor in float32, and where devices
take a leaf tensor by tensor one of those.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import pairwise

import jax.numpy as jnp
import numpy as np

from milora_jax.base.leaf_buffers import Box, Buffer
from milora_jax.base.specs import Encoded, LeafSpec, Part
from milora_jax.base.tensor_file import FLOATING, TensorFile
from milora_jax.errors import UserError

THREADS = 4
"""Tensors that are read at a time."""

PIECE_BYTES = 2**25
"""Of a tensor that is divided among threads, at least."""

TRANSPOSED_ROWS = 16
"""Rows that become columns together: more of them, and a processor's cache forgets the first before the last
is written; measured on two EPYC cores, 1.5 GB/s against 0.3 for all of a tensor at once."""

Scales = dict[tuple[str, int, int], np.ndarray]
"""Scales of the kernel read last, by the tensor, the first of its columns and the one after the last."""


Task = Callable[[], int]

Placed = Sequence[tuple[Box, Buffer]]
"""Boxes of a leaf, and where their values go."""


@dataclass(frozen=True)
class Source:
    """A tensor to read from.

    Attributes:
      shape: that it must have, as the leaf orders its axes.
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
      files: by tensor.
      scales: filled by the codes of a kernel, emptied by its scales.
      pool: reads.
      note: told by the calling thread how many bytes of values have been put, again and again.

    Raises:
      UserError: naming the tensor that is damaged or misshapen.
    """
    encoded = spec.encoded
    if encoded is None:
        tasks = _plain_tasks(spec, placed, files)
    else:
        tasks = _encoded_tasks(spec, encoded, placed, files, scales)
    # The first error is raised when its result is asked for; no other thread is left behind.
    for size in pool.map(lambda task: task(), tasks):
        note(size)


def _source(spec: LeafSpec, part: Part, files: Mapping[str, TensorFile]) -> Source:
    return Source(files[part.name], part.name, spec.tensor_shape(part), spec.transposed)


def _plain_tasks(spec: LeafSpec, placed: Placed, files: Mapping[str, TensorFile]) -> Iterator[Task]:
    """One task for every tensor, or for some rows of it; each returns the bytes it has put."""

    def read(source: Source, buffer: Buffer, place: Box, mine: Box) -> int:
        region = buffer.region(place)
        read_slices(region if region.ndim == len(mine) else region[0], source, mine)
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
    """A part of a tensor, divided by rows of the file: one tensor may be most of what there is to read."""
    axis = len(mine) - 1 if transposed else 0
    rows, front = mine[axis], len(place) - len(mine)
    size = math.prod(side.stop - side.start for side in mine) * itemsize
    count = max(1, min(THREADS, size // PIECE_BYTES))
    edges = [(rows.stop - rows.start) * i // count for i in range(count + 1)]
    for first, end in pairwise(edges):
        yield _with_side(place, front + axis, first, end), _with_side(mine, axis, first, end)


def _with_side(box: Box, axis: int, first: int, end: int) -> Box:
    """A box of which some rows are left, counted from its own first one."""
    start = box[axis].start
    return (*box[:axis], slice(start + first, start + end), *box[axis + 1 :])


def _encoded_tasks(
    spec: LeafSpec, encoded: Encoded, placed: Placed, files: Mapping[str, TensorFile], scales: Scales
) -> Iterator[Task]:
    """One task for every tensor: of a quantised kernel all rows of the columns are read, once."""

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
            buffer.put(found[0], values if values.ndim == len(box) else values[None])
            size += values.nbytes
        return size

    for part in spec.parts:
        yield functools.partial(encode, part)


def _encoded(encoded: Encoded, source: Source, mine: Box, scales: Scales) -> np.ndarray:
    """Codes or scales of whole columns of a tensor. The codes are asked for first, and leave their scales."""
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
    """Copy slices of one tensor into their place, checking its shape and that it holds floating numbers.

    Args:
      mine: the slices, one per axis, as the leaf orders them.
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
        values = _cast(chunk[(slice(None), *rest)], into.dtype)
        at = start - rows.start
        if source.transposed:
            _transpose(values, into[:, at : at + len(values)])
        else:
            into[at : at + len(values)] = values


def _transpose(rows: np.ndarray, into: np.ndarray) -> None:
    """Copy rows into columns.

    Two rows are woven into words of twice the width, by operations that a processor does for many numbers at
    once, so that half as many words are then copied one by one: two EPYC cores transpose 3.3 GB/s of bfloat16
    so, and 1.9 number by number; XLA's transposition is between the two, but into an array of its own.
    """
    bits = 8 * rows.dtype.itemsize
    single, double = np.dtype(f"uint{bits}"), np.dtype(f"uint{2 * bits}")
    rows, into = rows.view(single), into.view(single)
    even = 0
    if rows.shape[1] % 2 == 0 and rows.flags.c_contiguous:
        even = len(rows) // 2 * 2
        pairs = rows[:even].view(double)
        first, second, lower = pairs[0::2], pairs[1::2], double.type(2**bits - 1)
        woven = second << double.type(bits)
        np.bitwise_or(woven, first & lower, out=woven)
        _copy_transposed(woven, into[0::2, :even].view(double))
        woven = first >> double.type(bits)
        np.bitwise_or(woven, second & ~lower, out=woven)
        _copy_transposed(woven, into[1::2, :even].view(double))
    _copy_transposed(rows[even:], into[:, even:])


def _copy_transposed(rows: np.ndarray, into: np.ndarray) -> None:
    for i in range(0, len(rows), TRANSPOSED_ROWS):
        few = rows[i : i + TRANSPOSED_ROWS]
        into[:, i : i + len(few)] = few.T


def _cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The same numbers in another floating dtype."""
    if values.dtype == dtype:
        return values
    if values.dtype == jnp.bfloat16 and dtype == np.float32:
        # A bfloat16 is the upper half of a float32; the cast of ml_dtypes takes twice as long.
        return (values.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(dtype)
