"""A base from a Hugging Face directory, leaf by leaf.

Tensors are read a few at a time from ``model.safetensors`` or from the shards its index names, in chunks that
are transposed to ``[in, out]``, cast or encoded, and copied into their place in a stacked or joined leaf.
Beside the model each of :data:`THREADS` holds a chunk (of a quantised kernel, one tensor in float32) and,
where devices copy it, the process holds one leaf. Of a leaf that is spread over devices a process reads the
slices of its own devices, and each of them once. Nothing is ever left at an initial value: every expected
tensor must be there, with the expected shape, and no other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from milora_jax.base.families import FAMILIES
from milora_jax.base.json_files import read_json_object
from milora_jax.base.modules import Base
from milora_jax.base.specs import Encoded, LeafSpec, Part, base_specs, text_name
from milora_jax.base.tensor_file import FLOATING, TensorFile
from milora_jax.errors import UserError
from milora_jax.model_config import ModelConfig

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
ALIGNMENT = 64
"""Bytes to which XLA aligns buffers: a CPU device takes a host array so aligned as it is, uncopied."""

THREADS = 4
"""Tensors that are read at a time."""

PIECE_BYTES = 2**25
"""Of a tensor that is divided among threads, at least."""

TRANSPOSED_ROWS = 16
"""Rows of a file that become columns together: more of them, and a processor's cache forgets the first
before the last is written; measured on two EPYC cores, 1.5 GB/s against 0.3 for all at once."""

IGNORED_SUFFIX = "rotary_emb.inv_freq"
"""Old checkpoints store the rotary frequencies; they follow from the config."""


Box = tuple[slice, ...]
"""A part of a leaf: one slice per axis."""

Scales = dict[tuple[str, int, int], np.ndarray]
"""Scales of the kernel read last, by the tensor, the first of its columns and the one after the last."""


def load_leaves(
    directory: Path,
    config: ModelConfig,
    dtype: str,
    sharding_of: Callable[[" tuple"], Sharding] | None = None,
    decode: bool = False,
    quantize: str = "none",
) -> Base:
    """Read every leaf of the base.

    Args:
      sharding_of: where the leaf at a key path goes; None puts all on the first device of this process.
      decode: in the layout of ``modules.decode_layout``, which then need not be made of another.
      quantize: how the kernels of the layers are kept, one of ``config.QUANTIZE``. Of a quantised kernel a
        process reads all rows of the columns that its devices hold, once: they share scales.

    Raises:
      UserError: for a missing, extra or misshapen tensor, a pickle, or a damaged file.
    """
    files = files_by_tensor(directory)
    if FAMILIES[config.family].in_images:
        files = _of_text(files)
    specs = base_specs(config, decode, quantize)
    expected = {part.name for spec in jax.tree.leaves(specs) for part in spec.parts}
    found = {name for name in files if not name.endswith(IGNORED_SUFFIX)}
    if config.tie_embeddings:
        found.discard("lm_head.weight")  # some tied checkpoints store the shared matrix twice
    _require_same_names(directory, expected, found)

    one_device = SingleDeviceSharding(jax.local_devices()[0])
    scales: Scales = {}

    def read(path: tuple, spec: LeafSpec) -> jax.Array:
        sharding = one_device if sharding_of is None else sharding_of(path)

        def box_of(index: Any) -> Box:
            return tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, spec.shape, strict=True))

        # Devices that hold the same share one reading.
        boxes = {
            str(box): box
            for box in map(box_of, sharding.addressable_devices_indices_map(spec.shape).values())
        }
        values = _read_boxes(spec, boxes, dtype, files, scales, pool)
        leaf = jax.make_array_from_callback(spec.shape, sharding, lambda index: values[str(box_of(index))])
        # Devices copy in the background: without waiting, finished leaves pile up in host memory.
        return jax.block_until_ready(leaf)

    with ThreadPoolExecutor(THREADS) as pool:
        return jax.tree_util.tree_map_with_path(read, specs)


def save_base(directory: Path, base: Base, config: ModelConfig, dtype: str) -> None:
    """Write ``model.safetensors`` in Hugging Face's names and layout; :func:`load_leaves` reads it."""
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray] = {}

    def write(spec: LeafSpec, leaf: jax.Array) -> None:
        host = np.asarray(leaf).astype(jnp.dtype(dtype))
        for part in spec.parts:
            if part.columns is not None:
                raise ValueError("a base in the layout for decoding is not written")
            tensor = host if part.layer is None else host[part.layer]
            tensor = np.ascontiguousarray(tensor.T if spec.transposed else tensor)
            if part.outputs is None:
                tensors[part.name] = tensor
                continue
            first, end, count = part.outputs
            whole = np.empty((count, *tensor.shape[1:]), tensor.dtype)
            tensors.setdefault(part.name, whole)[first:end] = tensor

    jax.tree.map(write, base_specs(config), base)
    save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt"})


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def files_by_tensor(directory: Path) -> dict[str, TensorFile]:
    """The file that holds each tensor, by the headers of all files."""
    if not directory.is_dir():
        raise UserError(f"model.path {str(directory)!r}: no such directory, expected a Hugging Face model")
    files: dict[str, TensorFile] = {}
    for path, only in _weight_files(directory):
        file = TensorFile.at(path)
        names = set(file.entries)
        if only is not None and names != only:
            wrong = sorted(names ^ only)[0]
            raise UserError(f"{path}: tensor {wrong!r} is in the file or in the index, not in both")
        files.update(dict.fromkeys(names, file))
    return files


def _of_text(files: dict[str, TensorFile]) -> dict[str, TensorFile]:
    """The tensors of the language model within a model of images, under the names that they have alone."""
    return {
        plain: TensorFile(file.path, {plain: file.entries[name]})
        for name, file in files.items()
        if (plain := text_name(name)) is not None
    }


def _weight_files(directory: Path) -> Iterator[tuple[Path, set[str] | None]]:
    """Every weight file with the tensors the index gives it; None where there is no index."""
    index_path, single = directory / INDEX_NAME, directory / WEIGHTS_NAME
    if single.is_file():
        yield single, None
        return
    if not index_path.is_file():
        pickles = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        found = f"; found {pickles[0]}, but pickles are never loaded" if pickles else ""
        raise UserError(f"{directory}: expected {WEIGHTS_NAME} or {INDEX_NAME}{found}")
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index_path}: expected a non-empty object 'weight_map'")
    by_file: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        plain = isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name
        if not plain:
            raise UserError(
                f"{index_path}: tensor {tensor!r} is in {name!r}: "
                "expected a safetensors file of this directory"
            )
        by_file.setdefault(name, set()).add(tensor)
    for name in sorted(by_file):
        if not (directory / name).is_file():
            raise UserError(f"{index_path}: names {name!r}, which is missing")
        yield directory / name, by_file[name]


def _require_same_names(directory: Path, expected: set[str], found: set[str]) -> None:
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing:
        raise UserError(f"{directory}: tensor {missing[0]!r} is missing ({len(missing)} in all)")
    if extra:
        raise UserError(
            f"{directory}: unexpected tensor {extra[0]!r} ({len(extra)} in all); "
            "config.json does not ask for it"
        )


def _read_boxes(
    spec: LeafSpec,
    boxes: dict[str, Box],
    dtype: str,
    files: dict[str, TensorFile],
    scales: Scales,
    pool: Executor,
) -> dict[str, np.ndarray]:
    """The values of a leaf within boxes, by their names.

    Args:
      dtype: of plain leaves.
      scales: filled by the codes of a kernel, emptied by its scales.
      pool: reads.
    """
    values = {
        name: _aligned_empty(tuple(side.stop - side.start for side in box), spec.dtype(dtype))
        for name, box in boxes.items()
    }

    def read_encoded(part: Part) -> None:
        columns: dict[tuple[int, int], np.ndarray] = {}  # for boxes of any rows
        for name, box in boxes.items():
            found = part.within(spec.rows_read(box))
            if found is None or spec.encoded is None:
                continue
            place, mine = found
            ends = _ends(mine[-1])
            if ends not in columns:
                source = (files[part.name], part.name, spec.tensor_shape(part))
                columns[ends] = _encoded(spec.encoded, source, mine, spec.transposed, scales)
            values[name][place] = columns[ends][box[-2]]

    def pieces() -> Iterator[tuple]:
        for part in spec.parts:
            for name, box in boxes.items():
                found = part.within(box)
                if found is not None:
                    place, mine = found
                    source = (files[part.name], part.name, spec.tensor_shape(part))
                    for into, rows in _pieces(values[name][place], mine, spec.transposed):
                        yield into, *source, rows, spec.transposed

    # The first error is raised when its result is asked for; no other thread is left behind.
    if spec.encoded is None:
        list(pool.map(lambda piece: _read_into(*piece), pieces()))
    else:
        list(pool.map(read_encoded, spec.parts))
    return values


def _pieces(place: np.ndarray, mine: Box, transposed: bool) -> Iterator[tuple[np.ndarray, Box]]:
    """A part of a tensor, divided by rows of the file: one tensor may be most of what there is to read."""
    axis = -1 if transposed else 0
    rows = mine[axis]
    count = max(1, min(THREADS, place.nbytes // PIECE_BYTES))
    edges = [rows.start + (rows.stop - rows.start) * i // count for i in range(count + 1)]
    for first, end in pairwise(edges):
        here = slice(first - rows.start, end - rows.start)
        if transposed:
            yield place[..., here], (*mine[:-1], slice(first, end))
        else:
            yield place[here], (slice(first, end), *mine[1:])


def _encoded(
    encoded: Encoded,
    source: tuple[TensorFile, str, tuple[int, ...]],
    mine: Box,
    transposed: bool,
    scales: Scales,
) -> np.ndarray:
    """Codes or scales of whole columns of a tensor. The codes are asked for first, and leave their scales."""
    file, name, _ = source
    key = (name, *_ends(mine[-1]))
    if encoded.scales:
        return scales.pop(key)
    plain = np.empty([side.stop - side.start for side in mine], np.float32)
    _read_into(plain, *source, mine, transposed)
    if not np.isfinite(plain).all():
        raise UserError(f"{file.path}: tensor {name!r} has a value that is not finite")
    scales[key] = encoded.scheme.scales_of(plain)
    return encoded.scheme.codes_of(plain, scales[key])


def _ends(side: slice) -> tuple[int, int]:
    return side.start, side.stop


def _read_into(
    place: np.ndarray,
    file: TensorFile,
    name: str,
    shape: tuple[int, ...],
    mine: tuple[slice, ...],
    transposed: bool,
) -> None:
    """Copy slices of one tensor into their place, checking its shape and that it holds floating numbers.

    Args:
      shape: of the whole tensor, as the leaf orders its axes.
      mine: the slices, likewise.
    """
    order = -1 if transposed else 1
    entry = file.entries[name]
    if entry.shape != shape[::order]:
        raise UserError(f"{file.path}: tensor {name!r} has shape {entry.shape}, expected {shape[::order]}")
    if entry.dtype not in FLOATING:
        raise UserError(f"{file.path}: tensor {name!r} has dtype {entry.dtype}, expected a floating type")
    rows, *rest = mine[::order]
    for start, chunk in file.chunks(name, rows.start, rows.stop):
        values = _cast(chunk[(slice(None), *rest)], place.dtype)
        at = start - rows.start
        if not transposed:
            place[at : at + len(values)] = values
            continue
        # As words: NumPy copies its own dtypes faster than bfloat16.
        words = jnp.dtype(f"uint{8 * place.dtype.itemsize}")
        into, values = place.view(words), values.view(words)
        for i in range(0, len(values), TRANSPOSED_ROWS):
            few = values[i : i + TRANSPOSED_ROWS]
            into[:, at + i : at + i + len(few)] = few.T


def _cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The same numbers in another floating dtype."""
    if values.dtype == dtype:
        return values
    if values.dtype == jnp.bfloat16 and dtype == np.float32:
        # A bfloat16 is the upper half of a float32; the cast of ml_dtypes takes twice as long.
        return (values.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(dtype)
