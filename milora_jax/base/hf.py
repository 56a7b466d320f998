"""Load a base from a Hugging Face directory, leaf by leaf.

Tensors come from ``model.safetensors`` or from the shards that its index names, a few at a time. A process
reads only the slices of a leaf that its own devices hold, and each of them once. No leaf stays at an initial
value: every expected tensor must be present with the expected shape, and there must be no other tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from milora_jax.base.byte_files import ByteFile
from milora_jax.base.families import FAMILIES
from milora_jax.base.json_files import read_json_object
from milora_jax.base.leaf_buffers import Box, Buffer, Device, buffer_for, shape_of
from milora_jax.base.leaf_reading import THREADS, Scales, fill
from milora_jax.base.modules import Base
from milora_jax.base.source import WEIGHTS, weight_files
from milora_jax.base.specs import LeafSpec, base_specs, text_name
from milora_jax.base.tensor_file import TensorFile
from milora_jax.errors import UserError
from milora_jax.model_config import ModelConfig

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
IGNORED_SUFFIX = "rotary_emb.inv_freq"
"""Old checkpoints store the rotary frequencies; they follow from the config."""


Progress = Callable[[int, int], None]
"""A callback for progress: receives the amount done and the total."""


def ignore(done: int, total: int) -> None:
    """Show no progress."""


def load_leaves(
    directory: Path,
    config: ModelConfig,
    dtype: str,
    sharding_of: Callable[[" tuple"], Sharding] | None = None,
    decode: bool = False,
    quantize: str = "none",
    progress: Progress = ignore,
) -> Base:
    """Read every leaf of the base.

    Args:
      sharding_of: maps a key path to the leaf's sharding; None puts all leaves on this process's first
        device.
      decode: load the layout of ``modules.decode_layout`` directly: modules with a common input are joined,
        or apart where there is a ``sharding_of``.
      quantize: how the kernels of the layers are stored, one of ``config.QUANTIZE``. A process reads all rows
        of the columns of a quantised kernel that its devices hold, once, because they share scales.
      progress: called by this thread with the bytes of the leaves read so far and their total.

    Raises:
      UserError: a tensor is missing, unexpected or misshapen, or a file is damaged or a pickle.
    """
    files = files_by_tensor(directory)
    if FAMILIES[config.family].in_images:
        files = _of_text(files)
    specs = base_specs(config, decode, quantize, joined=sharding_of is None)
    expected = {part.name for spec in jax.tree.leaves(specs) for part in spec.parts}
    found = {name for name in files if not name.endswith(IGNORED_SUFFIX)}
    if config.tie_embeddings:
        found.discard("lm_head.weight")  # some tied checkpoints store the shared matrix twice
    _require_same_names(directory, expected, found)

    one_device = SingleDeviceSharding(jax.local_devices()[0])

    def planned(path: tuple, spec: LeafSpec) -> _Plan:
        sharding = one_device if sharding_of is None else sharding_of(path)
        return _Plan.of(spec, sharding, spec.dtype(dtype))

    plans = jax.tree_util.tree_map_with_path(planned, specs)
    total = sum(plan.size for plan in jax.tree.leaves(plans))
    scales: Scales = {}
    done = 0

    def note(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    def read(plan: _Plan) -> jax.Array:
        placed = plan.buffers()
        fill(plan.spec, placed, files, scales, pool, note)
        return plan.leaf(buffer for _, buffer in placed)

    with ThreadPoolExecutor(THREADS) as pool:
        return jax.tree.map(read, plans)


@dataclass(frozen=True)
class _Plan:
    """The parts of a leaf that this process reads.

    Attributes:
      boxes: boxes of the leaf, each with the devices that hold it; a box is read once for all of them.
    """

    spec: LeafSpec
    sharding: Sharding
    dtype: np.dtype
    boxes: tuple[tuple[Box, tuple[Device, ...]], ...]

    @classmethod
    def of(cls, spec: LeafSpec, sharding: Sharding, dtype: np.dtype) -> _Plan:
        """Plan the reading of a leaf with this sharding."""
        holders: dict[str, tuple[Box, tuple[Device, ...]]] = {}
        indices: dict[Device, Any] = dict(sharding.addressable_devices_indices_map(spec.shape))
        for device, index in indices.items():
            box = tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, spec.shape, strict=True))
            _, others = holders.get(str(box), (box, ()))
            holders[str(box)] = (box, (*others, device))
        return cls(spec, sharding, dtype, tuple(holders.values()))

    @property
    def size(self) -> int:
        """Bytes of the boxes."""
        return sum(math.prod(shape_of(box)) for box, _ in self.boxes) * self.dtype.itemsize

    def buffers(self) -> list[tuple[Box, Buffer]]:
        """Make a buffer for every box."""
        return [(box, buffer_for(shape_of(box), self.dtype, devices)) for box, devices in self.boxes]

    def leaf(self, buffers: Iterable[Buffer]) -> jax.Array:
        """Assemble the leaf from filled buffers."""
        arrays = [array for buffer in buffers for array in buffer.arrays()]
        leaf = jax.make_array_from_single_device_arrays(self.spec.shape, self.sharding, arrays)
        # Devices copy asynchronously: without waiting, finished leaves accumulate in host memory.
        return jax.block_until_ready(leaf)


def save_base(directory: Path, base: Base, config: ModelConfig, dtype: str) -> None:
    """Write ``model.safetensors`` in Hugging Face's names and layout; :func:`load_leaves` reads it."""
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray] = {}

    def write(spec: LeafSpec, leaf: jax.Array) -> None:
        host = np.asarray(leaf).astype(jnp.dtype(dtype))
        for part in spec.parts:
            if part.columns is not None:
                raise ValueError("a base in the layout for decoding is not written")
            tensor = host[part.front]
            tensor = np.ascontiguousarray(tensor.T if spec.transposed else tensor)
            if part.outputs is None:
                tensors[part.name] = tensor
                continue
            first, end, count = part.outputs
            whole = np.empty((count, *tensor.shape[1:]), tensor.dtype)
            tensors.setdefault(part.name, whole)[first:end] = tensor

    jax.tree.map(write, base_specs(config), base)
    save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt"})


def files_by_tensor(directory: Path) -> dict[str, TensorFile]:
    """Map each tensor to the file that holds it, by the headers of all files."""
    if not directory.is_dir():
        raise UserError(f"model.path {str(directory)!r}: no such directory, expected a Hugging Face model")
    files: dict[str, TensorFile] = {}
    for stored, only in _weight_files(directory):
        file = TensorFile.of(stored)
        names = set(file.entries)
        if only is not None and names != only:
            wrong = sorted(names ^ only)[0]
            raise UserError(f"{file.name}: tensor {wrong!r} is in the file or in the index, not in both")
        files.update(dict.fromkeys(names, file))
    return files


def plain_tensors(directory: Path) -> dict[str, TensorFile]:
    """The file of each tensor of a language model, under its name in a pure language model."""
    return _of_text(files_by_tensor(directory))


def _of_text(files: dict[str, TensorFile]) -> dict[str, TensorFile]:
    """The tensors of the language model within a vision-language model, under a language model's names."""
    return {
        plain: TensorFile(file.file, {plain: file.entries[name]})
        for name, file in files.items()
        if (plain := text_name(name)) is not None
    }


def _weight_files(directory: Path) -> Iterator[tuple[ByteFile, set[str] | None]]:
    """Every weight file with the tensors that the index assigns to it; None where there is no index."""
    index_path, stored = directory / INDEX_NAME, weight_files(directory)
    if WEIGHTS_NAME in stored:
        yield stored[WEIGHTS_NAME], None
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
        plain = isinstance(name, str) and name.endswith(WEIGHTS) and Path(name).name == name
        if not plain:
            raise UserError(
                f"{index_path}: tensor {tensor!r} is in {name!r}: "
                "expected a safetensors file of this directory"
            )
        by_file.setdefault(name, set()).add(tensor)
    for name in sorted(by_file):
        if name not in stored:
            raise UserError(f"{index_path}: names {name!r}, which is missing")
        yield stored[name], by_file[name]


def _require_same_names(directory: Path, expected: set[str], found: set[str]) -> None:
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing:
        raise UserError(f"{directory}: tensor {missing[0]!r} is missing ({len(missing)} in all)")
    if extra:
        raise UserError(
            f"{directory}: unexpected tensor {extra[0]!r} ({len(extra)} in all); "
            "config.json does not ask for it"
        )
