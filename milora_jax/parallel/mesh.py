"""The device mesh: axes ``data``, ``fsdp``, ``expert`` and ``tensor``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh

from milora_jax.config import Config, MeshSection, parse_mesh
from milora_jax.errors import UserError, require
from milora_jax.model_config import ModelConfig

AXES = ("data", "fsdp", "expert", "tensor")
AXIS_TYPES = (AxisType.Auto,) * 4


def make_mesh(settings: MeshSection, devices: Sequence[Any] | None = None) -> Mesh:
    """Arrange the devices as the settings ask; an axis of -1 takes all that remain.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _sizes(settings, len(devices))
    try:
        return jax.make_mesh(sizes, AXES, axis_types=AXIS_TYPES, devices=devices)
    except NotImplementedError:
        # Our axes are not those of the chips' physical grid, and two of ours may share one of its.
        grid = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=AXIS_TYPES)


def eval_mesh(mesh: Mesh, config: Config) -> Mesh:
    """The mesh of the scoring: that of training, or ``eval.mesh`` over the same devices in the same order, so
    that one program can read arrays of both.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    if not config.eval.mesh:
        return mesh
    sizes = _sizes(parse_mesh(config.eval.mesh, "eval.mesh"), mesh.size)
    return Mesh(mesh.devices.reshape(sizes), AXES, axis_types=AXIS_TYPES)


def _sizes(settings: MeshSection, count: int) -> tuple[int, ...]:
    """The size of each axis over so many devices."""
    sizes = [settings.data, settings.fsdp, settings.expert, settings.tensor]
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and count % fixed == 0:
        sizes[sizes.index(-1)] = count // fixed
    if math.prod(sizes) != count:
        raise UserError(f"mesh {settings} does not fit {count} device(s)")
    return tuple(sizes)


def check_divides(
    mesh: Mesh,
    model: ModelConfig,
    batch_sizes: dict[str, int],
    parts: dict[str, int] | None = None,
    heads: bool = True,
) -> None:
    """Refuse a mesh that cannot split the batches, the heads or the widths evenly.

    Args:
      batch_sizes: rows of each kind of batch, by the name of its setting.
      parts: number of parts for gradient accumulation, by the same names; 1 by default.
      heads: whether each device must have whole heads; otherwise XLA divides them where they do not fit.
    """
    expert = mesh.shape["expert"]
    rows = mesh.shape["data"] * mesh.shape["fsdp"] * expert
    over = "mesh data x fsdp" if expert == 1 else "mesh data x fsdp x expert"
    for name, size in batch_sizes.items():
        count = (parts or {}).get(name, 1)
        what = over if count == 1 else f"{over} x train.accumulate"
        require(size % (rows * count) == 0, name, size, f"a multiple of {what} = {rows * count}")
    divides = model.num_experts % expert == 0 and (model.num_experts > 0 or expert == 1)
    require(divides, "num_experts", model.num_experts, f"a multiple of mesh.expert = {expert}, above 0")
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    whole = ("num_heads", "num_kv_heads") if heads else ()
    for name in (*whole, "intermediate_size", "vocab_size"):
        size = getattr(model, name)
        require(size % tensor == 0, name, size, f"a multiple of mesh.tensor = {tensor}")
    require(
        model.hidden_size % fsdp == 0, "hidden_size", model.hidden_size, f"a multiple of mesh.fsdp = {fsdp}"
    )


def check_meshes(mesh: Mesh, config: Config, model: ModelConfig) -> None:
    """Refuse a config whose steps or answers cannot be divided evenly, see :func:`check_divides`.

    Args:
      mesh: mesh of training.
    """
    steps = {"train.batch_size": config.train.batch_size}
    check_divides(mesh, model, steps, {"train.batch_size": config.train.accumulate})
    answers = {"eval.batch_size": config.eval.batch_size}
    check_divides(eval_mesh(mesh, config), model, answers, heads=False)
