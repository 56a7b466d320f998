"""Start training from the adapter of an earlier run or from an imported one; a preference objective takes
that adapter for its reference model as well."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from milora_jax.adapters.inputs import Shape
from milora_jax.adapters.milora import OF_TRAINING
from milora_jax.adapters.protocol import Adapter, Method
from milora_jax.adapters.registry import adapter_shape, build_method
from milora_jax.base.source import model_directory
from milora_jax.config import Config
from milora_jax.errors import UserError, require
from milora_jax.model_config import ModelConfig
from milora_jax.parallel.processes import place
from milora_jax.parallel.rules import state_shardings
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


def reference_adapter(config: Config, model: ModelConfig, mesh: Mesh) -> tuple[Adapter | None, str]:
    """The adapter of a preference objective's reference model: that of ``train.init_from``, laid out over the
    devices, and SHA-256 over its parameters.

    Returns:
      None and "" where the reference model is the plain base, or the objective has none.

    Raises:
      UserError: as :func:`starting_params`.
    """
    train = config.train
    if not train.init_from or train.objective in ("sft", "orpo"):
        return None, ""
    method, shape = build_method(config.adapter), adapter_shape(model)
    params = starting_params(train.init_from, method, shape, model_directory(config.model.path))
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(f"{leaf.dtype} {leaf.shape}\0".encode() + leaf.tobytes())
    placed = jax.tree.map(place, params, state_shardings(mesh, params))
    return Adapter(params=placed, method=method, shape=shape), digest.hexdigest()
