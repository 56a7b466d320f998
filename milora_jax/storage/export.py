"""Export a trained adapter: portable, for PEFT, as a checkpoint, or merged into its base.

Every export is a directory that appears whole or not at all, sealed by a manifest. Where the format cannot
name the adapter's base, ``export.json`` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from milora_jax.adapters.protocol import Method
from milora_jax.base.json_files import parse_json_object
from milora_jax.storage.adapters import checked_metadata, newest_step, read_adapter
from milora_jax.storage.checkpoint import CheckpointDirectory
from milora_jax.storage.exported import is_exported, write_exported
from milora_jax.storage.files import json_bytes, new_directory, read_bytes
from milora_jax.storage.fixed import MERGED, fixed_change, static_lora
from milora_jax.storage.manifest import write_manifest
from milora_jax.storage.merged import write_merged
from milora_jax.storage.peft import write_peft

ORIGIN_FILE = "export.json"
"""File in exports of foreign formats with what this package needs to know about them."""


def formats_of(method: Method, fused: bool) -> tuple[str, ...]:
    """The formats that need no rows to fix a route for an adapter of a method, the most portable first.

    Args:
      fused: a property of the base's family, see ``base.families``.
    """
    always = method.record is not None and not method.routes
    has = {
        "milora": method.portable,
        "peft": always and not fused,
        "orbax": True,
        "merged": always and method.record in MERGED,
    }
    return tuple(name for name, there_is in has.items() if there_is)


def export_milora(source: Path, out: Path) -> None:
    """Write the adapter of ``source`` in the form of ``storage.exported``.

    Args:
      source: a path for ``read_adapter``; likewise in the functions below.
      out: a new or an empty directory.

    Raises:
      UserError: the adapter cannot be read, its method has no such form, or ``out`` is not empty; likewise
        in the functions below.
    """
    adapter, metadata = read_adapter(source)
    with new_directory(out) as partial:
        write_exported(partial, adapter, metadata)


def export_peft(source: Path, out: Path, base_name: str) -> None:
    """Write the adapter of ``source`` as PEFT saves one.

    Args:
      base_name: path or Hub name of the base, which PEFT's own loaders open.
    """
    adapter, metadata = read_adapter(source)
    with new_directory(out) as partial:
        write_peft(partial, adapter, base_name)
        seal(partial, metadata, {"format": "peft"})


def export_orbax(source: Path, out: Path) -> None:
    """Write the adapter of ``source`` as the one step of a directory of checkpoints, for any method."""
    adapter, metadata = read_adapter(source)
    step = 0 if is_exported(source) else newest_step(source)[1]
    with new_directory(out) as partial:
        directory = CheckpointDirectory(partial, None, print)
        directory.save(step, adapter.params, metadata)
        directory.wait()


def export_static(
    source: Path, out: Path, base_name: str, weights: np.ndarray, origin: dict[str, Any]
) -> None:
    """Write a MiLoRA under one fixed route as PEFT saves a LoRA.

    Args:
      weights: of the route, ``[L, E]``.
      origin: what to keep about it in ``export.json``.
    """
    adapter, metadata = read_adapter(source)
    with new_directory(out) as partial:
        write_peft(partial, static_lora(adapter, weights), base_name)
        seal(partial, metadata, {"format": "static", **origin})


def export_merged(
    source: Path, base: Path, out: Path, weights: np.ndarray | None, origin: dict[str, Any], shard_bytes: int
) -> None:
    """Write the base with the adapter in its weights.

    Args:
      base: Hugging Face directory that the adapter was made on.
      weights: of one fixed route, ``[L, E]``, for a method that routes; None for any other.
      origin: what to keep about it in ``export.json``.
      shard_bytes: of the largest file.
    """
    adapter, metadata = read_adapter(source)
    change = fixed_change(adapter, weights)
    with new_directory(out) as partial:
        write_merged(base, partial, change, shard_bytes)
        seal(partial, metadata, {"format": "merged", **origin})


def read_origin(directory: Path) -> dict[str, Any]:
    """What :func:`seal` has said about an export.

    Raises:
      UserError: the file is missing, or is not what was written.
    """
    where = directory / ORIGIN_FILE
    return checked_metadata(parse_json_object(read_bytes(where), str(where)), str(where))


def seal(directory: Path, metadata: dict[str, Any], origin: dict[str, Any]) -> None:
    """Add what we want to know about an export later, and the manifest.

    Args:
      metadata: of the adapter, see ``storage.adapters.adapter_metadata``.
      origin: what else to say.
    """
    names = ("base_fingerprint", "adapter", "shape", "prompt_format")
    known = {name: metadata[name] for name in names if name in metadata}
    (directory / ORIGIN_FILE).write_bytes(json_bytes({**known, **origin}))
    write_manifest(directory)
