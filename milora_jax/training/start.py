"""Start training from the adapter of an earlier run or from an imported one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np

from milora_jax.adapters.inputs import Shape
from milora_jax.adapters.milora import OF_TRAINING
from milora_jax.adapters.protocol import Method
from milora_jax.errors import UserError, require
from milora_jax.storage.adapters import read_adapter, require_its_base
from milora_jax.types import PyTree

NOT_COMPUTED = ("dropout", *OF_TRAINING)
"""Settings that may differ from those of the adapter, because its computation does not depend on them."""


def starting_params(path: str, method: Method, shape: Shape, base: Path) -> PyTree:
    """Read the parameters of a stored adapter, to the host.

    Args:
      path: the path of the adapter, see ``read_adapter``.
      method, shape: those of the run, which the adapter must share.
      base: directory of the run's base, which the adapter must have been trained on.

    Raises:
      UserError: the adapter cannot be read, belongs to another base, or computes another function.
    """
    found, metadata = read_adapter(path)
    require_its_base(metadata, path, base)
    name = f"of the adapter in train.init_from {path!r}"
    if found.method.name != method.name:
        raise UserError(f"adapter.method is {method.name!r}: expected {found.method.name!r}, {name}")
    theirs = dataclasses.asdict(found.method)
    for setting, value in dataclasses.asdict(method).items():
        same = value == theirs[setting] or setting in NOT_COMPUTED
        if setting in ("alpha", "use_rslora"):  # an alpha of 0 is the rank
            same = same or getattr(method, "scale", None) == getattr(found.method, "scale", None)
        require(same, f"adapter.{setting}", value, f"{theirs[setting]!r}, {name}")
    require(found.shape == shape, "the shape of the base", shape, f"{found.shape}, {name}")
    return jax.tree.map(np.asarray, found.params)
