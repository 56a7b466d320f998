"""A base with an adapter merged into its weights, as a Hugging Face directory.

Tensors are read, changed and written one at a time. A changed weight is computed in float32 and rounded once,
to the dtype of the base's file. Every other tensor is copied unchanged, as are the config and the tokenizer's
files.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from milora_jax.base.families import FAMILIES
from milora_jax.base.hf import INDEX_NAME, WEIGHTS_NAME, files_by_tensor
from milora_jax.base.specs import FUSED_PATHS, MODULE_PATHS, text_name
from milora_jax.base.tensor_file import FLOATING, Entry, TensorFile
from milora_jax.errors import UserError, require
from milora_jax.storage.files import json_bytes
from milora_jax.storage.fixed import FixedChange
from milora_jax.types import EXPERTS

SHARD_BYTES = 5 * 10**9
"""Bytes of the largest file, as in transformers."""

COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "tokenizer*")
"""Files that are copied beside the weights. Python files are not: code of a model is never run."""

LEFT = (INDEX_NAME, "adapter_config.json", "manifest.json", "export.json")
"""Files that are not copied: transformers would load the adapter of an ``adapter_config.json`` on top."""

_PLACES = {path: (module,) for module, path in MODULE_PATHS.items()} | {
    path: tuple(module for module in EXPERTS if FUSED_PATHS.get(module) == path)
    for path in FUSED_PATHS.values()
}
_PLACES |= {
    path: (module,)
    for family in FAMILIES.values()
    for module, path in (family.expert_paths or {}).items()
    if module in EXPERTS
}
"""The modules that a weight holds, one after the other, by its path in a layer; ``{}`` is the number of one
of the base's experts, each of which gets the whole change."""

_WEIGHT = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")

_EXPERT = re.compile(r"(?<=experts\.)\d+(?=\.)")

Named = tuple[str, Entry]
"""A tensor of the base and its entry in the file's header."""


def write_merged(base: Path, out: Path, change: FixedChange, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the base with a change merged into its weights to an empty directory.

    Args:
      base: a Hugging Face directory that the adapter of ``change`` fits.
      shard_bytes: bytes of the tensors in one file; an index says which file holds each, if there are
        several.

    Raises:
      UserError: a file of the base is damaged, a changed weight is not finite in its dtype, or the change
        alters no number.
    """
    require(shard_bytes >= 1, "shard size", shard_bytes, "at least 1 byte")
    files = files_by_tensor(base)
    _require_all(files, change, base)
    shards = list(_packed(_described(files), shard_bytes))
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = [WEIGHTS_NAME] if len(shards) == 1 else names
    places = {}
    differs = False
    for name, shard in zip(names, shards, strict=True):
        differs |= _write_shard(out / name, shard, files, change)
        places |= {tensor: name for tensor, _ in shard}
    if not differs:
        raise UserError(f"merged into {str(base)!r} the adapter changes no number: it is lost in the dtype")
    if len(shards) > 1:
        total = sum(entry.size for shard in shards for _, entry in shard)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (out / INDEX_NAME).write_bytes(json_bytes(index))
    for path in sorted({path for pattern in COPIED for path in base.glob(pattern)}):
        if path.is_file() and path.name not in LEFT and path.suffix != ".py":
            shutil.copyfile(path, out / path.name)


def _place(name: str) -> tuple[int, tuple[str, ...]] | None:
    """Layer and modules of a weight that an adapter may change."""
    match = _WEIGHT.fullmatch(text_name(name) or "")
    path = "" if match is None else _EXPERT.sub("{}", match[2])
    return None if match is None or path not in _PLACES else (int(match[1]), _PLACES[path])


def _require_all(files: dict[str, TensorFile], change: FixedChange, base: Path) -> None:
    """Refuse a base without a weight for a module of the adapter, whose change would be lost."""
    found = {(place[0], module) for place in map(_place, files) if place for module in place[1]}
    for layer in range(len(change.weights)):
        for module in EXPERTS:
            if (layer, module) not in found:
                raise UserError(f"{base}: no weight of module {module!r} of layer {layer} to merge into")


def _described(files: dict[str, TensorFile]) -> Iterator[Named]:
    """All tensors in the order of their files."""
    for name, file in sorted(files.items(), key=lambda pair: (pair[1].name, pair[0])):
        entry = file.entries[name]
        if entry.dtype not in FLOATING:
            raise UserError(
                f"{file.name}: tensor {name!r} has dtype {entry.dtype}, expected one of {', '.join(FLOATING)}"
            )
        yield name, entry


def _packed(tensors: Iterator[Named], most: int) -> Iterator[list[Named]]:
    """Group tensors into shards of at most so many bytes; a larger tensor gets a shard of its own."""
    shard: list[Named] = []
    filled = 0
    for name, entry in tensors:
        if shard and filled + entry.size > most:
            yield shard
            shard, filled = [], 0
        shard.append((name, entry))
        filled += entry.size
    yield shard


def _write_shard(path: Path, shard: list[Named], files: dict[str, TensorFile], change: FixedChange) -> bool:
    """Write one safetensors file tensor by tensor; the library's writer needs all of them in memory.

    Returns:
      Whether any number in it differs from the base's.
    """
    differs = False
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in shard:
        offsets = [end, end + entry.size]
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        end += entry.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, _ in shard:
            before = files[name].whole(name)
            after = _changed(name, before, change)
            differs = differs or (after is not before and bool(np.any(after != before)))
            file.write(after.tobytes())
    return differs


def _changed(name: str, values: np.ndarray, change: FixedChange) -> np.ndarray:
    """Apply the change to a tensor of the base, if it is one of a layer's seven weights."""
    place = _place(name)
    if place is None:
        return values
    layer, modules = place
    parts = np.split(values, np.cumsum([change.outputs(module) for module in modules])[:-1])
    with np.errstate(over="ignore"):
        changed = [change.apply(layer, *pair) for pair in zip(modules, parts, strict=True)]
        merged = np.concatenate(changed).astype(values.dtype)
    if not np.isfinite(merged.astype(np.float32)).all():
        raise UserError(f"merged tensor {name!r} has values that are not finite in {values.dtype}")
    return merged
