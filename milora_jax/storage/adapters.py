"""A trained adapter on disk: its parameters and everything needed to use them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from milora_jax.adapters.hooks import abstract_params
from milora_jax.adapters.inputs import Shape
from milora_jax.adapters.protocol import Adapter, Method
from milora_jax.adapters.registry import adapter_shape, build_method, full_settings, stored_settings
from milora_jax.base.fingerprint import base_fingerprint
from milora_jax.base.hf_config import read_model_config
from milora_jax.config import QUANTIZE
from milora_jax.errors import UserError, one_of
from milora_jax.prompt_format import UNSTORED, PromptFormat, stored_prompt_format
from milora_jax.storage.checkpoint import CheckpointDirectory, read_metadata
from milora_jax.storage.exported import (
    is_exported,
    read_exported,
    read_exported_metadata,
    read_shape,
    shape_values,
)
from milora_jax.storage.mirror import fetched
from milora_jax.storage.peft_settings import PEFT_CONFIG, require_one

log = logging.getLogger("milora_jax.storage")


def adapter_metadata(
    method: Method, shape: Shape, base_fingerprint: str, quantize: str, prompt_format: PromptFormat
) -> dict[str, Any]:
    """The metadata that is stored beside an adapter's parameters, so that they can be read alone.

    Args:
      base_fingerprint: fingerprint of the base it was trained on, see ``base.fingerprint``.
      quantize: quantisation of that base.
      prompt_format: format of the prompts it was trained on.
    """
    return {
        "base_fingerprint": base_fingerprint,
        "quantize": quantize,
        "adapter": dataclasses.asdict(full_settings(method)),
        "shape": shape_values(shape),
        "prompt_format": prompt_format.to_dict(),
    }


def load_adapter(path: str | Path) -> Adapter:
    """Load a trained adapter; see :func:`read_adapter`."""
    return read_adapter(path)[0]


def read_adapter(path: str | Path) -> tuple[Adapter, dict[str, Any]]:
    """Read a trained adapter and its metadata; every file is read and checked once.

    An adapter that was stored without a prompt format has the one of all adapters of that time, and a warning
    in the log says so.

    Args:
      path: a workdir of ``train.py``, whose best adapter is read, a copy of its ``best`` folder, or an
        adapter that ``python -m milora_jax.storage`` exported as ``milora`` or ``orbax``, or imported; a
        directory or ``gs://BUCKET/PATH``.

    Raises:
      UserError: there is no adapter, or it is damaged, or has a value that is not finite.
    """
    with fetched(path) as folder:
        adapter, metadata = (read_exported if is_exported(folder) else _read_step)(folder)
    if adapter.prompt_format == UNSTORED:
        log.warning(
            "the adapter of %r does not say how its prompts were written: they begin with one "
            "beginning-of-sequence token, as those of all adapters did then",
            str(path),
        )
    return adapter, metadata


def _read_step(path: Path) -> tuple[Adapter, dict[str, Any]]:
    """:func:`read_adapter` of a workdir or of a folder of steps."""
    directory, step = newest_step(path)
    root = directory.root
    metadata = checked_metadata(read_metadata(root, step), str(root / str(step)))
    shape = read_shape(metadata["shape"], str(root))
    method = build_method(stored_settings(metadata["adapter"]))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        abstract_params(method, shape),
    )
    params, _ = directory.restore(step, placed)
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not bool(jnp.isfinite(leaf).all()):
            name = jax.tree_util.keystr(key_path)
            raise UserError(f"{str(root)!r}: adapter leaf {name} holds values that are not finite")
    prompt_format = stored_prompt_format(metadata.get("prompt_format"), str(root))
    return Adapter(params, method, shape, prompt_format), metadata


def best_metadata(path: str | Path) -> dict[str, Any]:
    """Read the metadata that :func:`read_adapter` returns, without the parameters."""
    with fetched(path) as folder:
        if is_exported(folder):
            return read_exported_metadata(folder)
        directory, step = newest_step(folder)
        return checked_metadata(read_metadata(directory.root, step), str(directory.root / str(step)))


def require_its_base(metadata: dict[str, Any], path: str | Path, base: Path) -> str:
    """Refuse an adapter beside files that are not those of its base.

    Args:
      metadata: metadata of the adapter, see :func:`read_adapter`.
      path: path of the adapter, for the error.
      base: directory of the base.

    Returns:
      The quantisation of that base, one of ``config.QUANTIZE``.

    Raises:
      UserError: the files are those of another base.
    """
    if metadata["base_fingerprint"] != base_fingerprint(base):
        raise UserError(
            f"the files of {str(base)!r} are not those that the adapter of {str(path)!r} was made on"
        )
    for line in misfits(metadata, base):
        raise UserError(f"{str(path)!r}: {line}")
    return metadata["quantize"]


def misfits(metadata: Mapping[str, Any], base: Path) -> Iterator[str]:
    """Yield a line if the shape of an adapter, whatever its fingerprint, is not that of the base."""
    found, expected = read_shape(metadata["shape"], "the adapter"), adapter_shape(read_model_config(base))
    if found != expected:
        yield f"made for a base of another shape: {found}, that of {str(base)!r} has {expected}"


def checked_metadata(values: Any, where: str) -> dict[str, Any]:
    """Check that metadata is that of :func:`adapter_metadata`, perhaps with further fields.

    Raises:
      UserError: a field is missing or ill-typed.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: metadata is no object")
    known = {"quantize": "none", **values}  # older adapters lack it
    for name, kind in (("base_fingerprint", str), ("adapter", dict), ("quantize", str)):
        if not isinstance(known.get(name), kind):
            raise UserError(f"{where}: metadata has no {name}, or an ill-typed one")
    one_of(f"{where}: quantize", known["quantize"], QUANTIZE)
    read_shape(known.get("shape"), where)
    stored_prompt_format(known.get("prompt_format"), where)
    return known


def newest_step(path: Path) -> tuple[CheckpointDirectory, int]:
    """Find the verified step with the adapter of a workdir, or of a copy of its ``best`` folder.

    Raises:
      UserError: there is no such step, or a newer one is damaged.
    """
    if (path / PEFT_CONFIG).is_file():
        raise UserError(
            f"{str(path)!r} is a PEFT adapter, which names no base: "
            "python -m milora_jax.storage import makes an adapter of it"
        )
    root = path / "best" if (path / "best").is_dir() else path
    if not root.is_dir():
        raise UserError(f"{str(path)!r}: no such directory, expected a workdir or an exported adapter")
    problems: list[str] = []
    directory = CheckpointDirectory(root, keep=1, warn=problems.append)
    step = directory.newest()
    # An older adapter beside a damaged one must not be taken for it unasked.
    if step is None or problems:
        if not problems:
            require_one(path)
        reason = f": {problems[0]}" if problems else ""
        raise UserError(f"{str(root)!r} holds no complete adapter{reason}")
    return directory, step
