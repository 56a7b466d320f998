"""A trained adapter on disk: its parameters and what is needed to use them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from milora_jax.adapters.protocol import Adapter, Method, Shape, abstract_params
from milora_jax.adapters.registry import build_method, full_settings
from milora_jax.base.fingerprint import base_fingerprint
from milora_jax.config import Config
from milora_jax.errors import UserError
from milora_jax.storage.checkpoint import CheckpointDirectory, read_metadata


def adapter_metadata(method: Method, shape: Shape, base_fingerprint: str, quantize: str) -> dict[str, Any]:
    """What is stored beside an adapter's parameters so that they can be read back alone.

    Args:
      base_fingerprint: of the base it was trained on, see ``base.fingerprint``.
      quantize: how that base was kept.
    """
    return {
        "base_fingerprint": base_fingerprint,
        "quantize": quantize,
        "adapter": dataclasses.asdict(full_settings(method)),
        "shape": {
            "modules": {name: list(dims) for name, dims in shape.modules},
            "num_layers": shape.num_layers,
            "hidden_size": shape.hidden_size,
        },
    }


def load_adapter(path: str | Path) -> Adapter:
    """Load a trained adapter.

    Args:
      path: a workdir of ``train.py`` (its best adapter is taken), or a copy of its ``best`` folder.

    Raises:
      UserError: where there is none, or it is damaged, or holds a value that is not finite.
    """
    directory, step = _newest(Path(path))
    root, metadata = directory.root, read_metadata(directory.root, step)
    shape_values = metadata["shape"]
    shape = Shape.of(
        {name: tuple(dims) for name, dims in shape_values["modules"].items()},
        shape_values["num_layers"],
        shape_values["hidden_size"],
    )
    method = build_method(Config.from_dict({"adapter": metadata["adapter"]}).adapter)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        abstract_params(method, shape),
    )
    params, _ = directory.restore(step, placed)
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not bool(jnp.isfinite(leaf).all()):
            name = jax.tree_util.keystr(key_path)
            raise UserError(f"{str(root)!r}: adapter leaf {name} holds values that are not finite")
    return Adapter(params=params, method=method, shape=shape)


def best_metadata(path: str | Path) -> dict[str, Any]:
    """What was stored beside the adapter that :func:`load_adapter` loads from the same ``path``."""
    directory, step = _newest(Path(path))
    return read_metadata(directory.root, step)


def require_its_base(path: str | Path, base: Path) -> str:
    """Refuse an adapter beside files other than those it was trained on.

    Args:
      path: of the adapter, as :func:`load_adapter` takes it.
      base: directory of the base.

    Returns:
      How that base was kept, one of ``config.QUANTIZE``.

    Raises:
      UserError: the files of the base are others.
    """
    stored = best_metadata(path)
    if stored["base_fingerprint"] != base_fingerprint(base):
        raise UserError(
            f"the files of {str(base)!r} are not those that the adapter of {str(path)!r} was made on"
        )
    return stored.get("quantize", "none")  # older adapters do not say


def _newest(path: Path) -> tuple[CheckpointDirectory, int]:
    root = path / "best" if (path / "best").is_dir() else path
    if not root.is_dir():
        raise UserError(f"{str(path)!r}: no such directory, expected a workdir or an exported adapter")
    problems: list[str] = []
    directory = CheckpointDirectory(root, keep=1, warn=problems.append)
    step = directory.newest()
    # An older adapter may lie beside a damaged one; it must not be taken for it unasked.
    if step is None or problems:
        reason = f": {problems[0]}" if problems else ""
        raise UserError(f"{str(root)!r} holds no complete adapter{reason}")
    return directory, step
