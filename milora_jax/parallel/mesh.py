"""The device mesh: axes ``data``, ``fsdp`` and ``tensor``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh

from milora_jax.config import MeshSection
from milora_jax.errors import UserError, require
from milora_jax.model_config import ModelConfig

AXES = ("data", "fsdp", "tensor")


def make_mesh(settings: MeshSection, devices: Sequence[Any] | None = None) -> Mesh:
    """Arrange the devices as the settings ask; an axis of -1 takes all that remain.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [settings.data, settings.fsdp, settings.tensor]
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh data={settings.data} fsdp={settings.fsdp} tensor={settings.tensor} "
            f"does not fit {len(devices)} device(s)"
        )
    types = (AxisType.Auto,) * 3
    try:
        return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)
    except NotImplementedError:
        # Our axes are not those of the chips' physical grid, and two of ours may share one of its.
        grid = create_device_mesh(tuple(sizes), devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=types)


def check_divides(
    mesh: Mesh, model: ModelConfig, batch_sizes: dict[str, int], parts: dict[str, int] | None = None
) -> None:
    """Refuse a mesh that cannot split the batches, the heads or the widths evenly.

    Args:
      batch_sizes: rows of each kind of batch, by the name of its setting.
      parts: number of parts for gradient accumulation, by the same names; 1 by default.
    """
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    for name, size in batch_sizes.items():
        count = (parts or {}).get(name, 1)
        what = "mesh data x fsdp" if count == 1 else "mesh data x fsdp x train.accumulate"
        require(size % (rows * count) == 0, name, size, f"a multiple of {what} = {rows * count}")
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    for name in ("num_heads", "num_kv_heads", "intermediate_size", "vocab_size"):
        size = getattr(model, name)
        require(size % tensor == 0, name, size, f"a multiple of mesh.tensor = {tensor}")
    require(
        model.hidden_size % fsdp == 0, "hidden_size", model.hidden_size, f"a multiple of mesh.fsdp = {fsdp}"
    )
