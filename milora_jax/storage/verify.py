"""Find faults of directories of this package and of PEFT adapters: one line each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from milora_jax.adapters.inputs import Shape
from milora_jax.adapters.registry import adapter_shape
from milora_jax.base.fingerprint import base_fingerprint
from milora_jax.base.hf_config import read_model_config
from milora_jax.errors import UserError
from milora_jax.storage.adapters import checked_metadata, misfits
from milora_jax.storage.checkpoint import METADATA, CheckpointDirectory, read_metadata, verify_step
from milora_jax.storage.export import ORIGIN_FILE, read_origin
from milora_jax.storage.exported import exported_findings, is_exported, read_exported_metadata, read_shape
from milora_jax.storage.manifest import MANIFEST, DamagedError, manifest_errors
from milora_jax.storage.pair_tensors import NOTHING, changes_nothing, differences, pair_name
from milora_jax.storage.peft import (
    IA3_LEAF,
    PEFT_DTYPES,
    peft_shapes,
    read_peft_tensors,
    require_unfused,
)
from milora_jax.storage.peft_settings import PEFT_CONFIG, PEFT_TENSORS, peft_names, read_peft_settings
from milora_jax.types import EXPERTS

_LAYER = re.compile(r"base_model\.model\.model\.layers\.([0-9]{1,4})\.")


def findings(path: Path, base: Path | None) -> dict[Path, list[str]]:
    """The faults of each directory that ``path`` names; a workdir and its folders hold one per step.

    Args:
      path: a workdir, its ``checkpoints`` or ``best``, one step, an export, or a PEFT adapter.
      base: a Hugging Face directory that must be the adapters' base; None skips that check.

    Raises:
      UserError: ``path`` holds nothing to check.
    """
    if is_exported(path):
        return {path: list(_exported_findings(path, base))}
    if (path / PEFT_CONFIG).exists():
        return {path: list(_peft_findings(path, base))}
    if (path / ORIGIN_FILE).exists():
        return {path: list(_sealed_findings(path, base))}
    folders = step_folders(path)
    named = [] if folders else peft_names(path)
    if named:
        return {path / name: list(_peft_findings(path / name, base)) for name in named}
    if not folders:
        expected = "a workdir, checkpoints/, best/, a step, an export or a PEFT adapter"
        raise UserError(f"{str(path)!r} holds no steps and no adapter: expected {expected}")
    return {folder: list(_step_findings(folder, base)) for folder in folders}


def step_folders(path: Path) -> list[Path]:
    """The steps at or below ``path``, in order."""
    roots = [path, path / "checkpoints", path / "best"]
    folders = [root / str(step) for root in roots for step in CheckpointDirectory(root, 1, print).steps()]
    return [path] if path.is_dir() and path.name.isdecimal() and not folders else folders


def _step_findings(folder: Path, base: Path | None) -> Iterator[str]:
    try:
        verify_step(folder)
    except DamagedError as error:
        yield f"damaged: {error.file}: {error.reason}"
        return
    try:
        metadata = read_metadata(folder.parent, int(folder.name))
        if metadata.keys() & {"adapter", "shape"}:  # else a training state, whose settings the run holds
            metadata = checked_metadata(metadata, METADATA)
    except UserError as error:
        yield str(error)
        return
    yield from _foreign(base, metadata)


def _exported_findings(path: Path, base: Path | None) -> Iterator[str]:
    found = list(exported_findings(path))
    yield from found
    if not found:
        yield from _foreign(base, read_exported_metadata(path))


def _sealed_findings(path: Path, base: Path | None) -> Iterator[str]:
    """The faults of an export in a foreign format: every byte must be as it was written."""
    found = [f"{error.file}: {error.reason}" for error in manifest_errors(path)]
    yield from found
    if not found:
        try:
            yield from _foreign(base, read_origin(path))
        except UserError as error:
            yield str(error)


def _peft_findings(path: Path, base: Path | None) -> Iterator[str]:
    """The faults of a PEFT directory of any origin, which has no manifest."""
    ours = (path / ORIGIN_FILE).exists() or (path / MANIFEST).exists()
    sealed = list(_sealed_findings(path, base)) if ours else []
    yield from sealed
    try:
        settings = read_peft_settings(path)
        tensors, prefix = read_peft_tensors(path / PEFT_TENSORS)
        shape = adapter_shape(read_model_config(base)) if base is not None else shape_of(tensors)
        if ours and not sealed:
            shape = read_shape(read_origin(path)["shape"], ORIGIN_FILE)
        if base is not None:
            require_unfused(read_model_config(base), base)
        expected = peft_shapes(shape, settings.kind, settings.plan(shape.num_layers, prefix))
    except UserError as error:
        yield str(error)
        return
    for line in differences(tensors, expected, PEFT_DTYPES):
        yield f"{PEFT_TENSORS}: {line}"
    if settings.kind != "ia3" and changes_nothing(tensors):
        yield f"{PEFT_TENSORS}: {NOTHING}"


def _foreign(base: Path | None, metadata: Mapping[str, Any]) -> Iterator[str]:
    if base is None:
        return
    found, expected = base_fingerprint(base), metadata.get("base_fingerprint")
    if found != expected:
        yield f"made on another base: fingerprint {expected}, that of {str(base)!r} is {found}"
    if "shape" in metadata:
        yield from misfits(metadata, base)


def shape_of(tensors: Mapping[str, np.ndarray]) -> Shape:
    """Infer the shape of the base of pairs or vectors: depth from their names, widths from the first layer
    that has a module's.

    Modules without tensors have widths of 1.
    """
    layers = sorted({int(match[1]) for match in map(_LAYER.match, tensors) if match})

    def size(module: str, leaf: str, axis: int) -> int:
        found = (tensors.get(pair_name(layer, module, leaf)) for layer in layers)
        return next((value.shape[axis] for value in found if value is not None and value.ndim), 1)

    dims = {
        module: (size(module, "a", -1), max(size(module, "b", 0), size(module, IA3_LEAF, 0)))
        for module in EXPERTS
    }
    return Shape.of(dims, 1 + max(layers, default=0), dims["q"][0])
