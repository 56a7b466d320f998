"""The sharding of every leaf: logical axes by leaf name, and the mesh axes that they map to.

A leaf whose name is not declared here is an error: a catch-all rule would replicate a misnamed
7B matrix on every chip, which nobody would notice before memory ran out.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from milora_jax.adapters.hooks import path_names
from milora_jax.base.attention import Attend, DeviceLayout, attention, has_cudnn, has_splash
from milora_jax.base.modules import Base, ends_of, unroll
from milora_jax.parallel.processes import place
from milora_jax.shapes import Array, Int
from milora_jax.types import Batch, PyTree

MESH_AXES: dict[str | None, str | tuple[str, ...] | None] = {
    "rows": ("data", "fsdp", "expert"),  # of a batch, over all data-parallel devices
    "embed": "fsdp",  # D of the base's matrices; gathered when used (fully sharded data parallelism)
    "heads": "tensor",  # query, key and value widths, so that a head never spans two chips
    "ffn": "tensor",  # F
    "experts": "expert",  # X
    "vocab": "tensor",  # V
    "layers": None,  # the stacking axis; splitting it would move whole layers between chips
    None: None,
}
"""The mesh axes over which each logical axis is split; None for an axis that is not split."""

BASE_AXES: dict[tuple[str, ...], tuple[str | None, ...]] = {
    ("embedding",): ("vocab", "embed"),
    ("final_norm",): (None,),
    ("head",): ("embed", "vocab"),
    **{
        ("layers", "norms", name): ("layers", None)
        for name in ("attention", "feedforward", "attention_post", "feedforward_post", "query", "key")
    },
    **{("layers", name, "kernel"): ("layers", "embed", "heads") for name in ("q", "k", "v")},
    **{("layers", name, "kernel"): ("layers", "embed", "ffn") for name in ("gate", "up")},
    ("layers", "o", "kernel"): ("layers", "heads", "embed"),
    ("layers", "down", "kernel"): ("layers", "ffn", "embed"),
    **{("layers", name, "bias"): ("layers", "heads") for name in ("q", "k", "v")},
    **{("layers", name, "bias"): ("layers", "ffn") for name in ("gate", "up")},
    ("layers", "o", "bias"): ("layers", None),
    ("layers", "down", "bias"): ("layers", None),
    # Blocks of rows are not split, because fsdp need not divide them: a seventeenth of what NF4 takes.
    **{("layers", name, "scales"): ("layers", None, "heads") for name in ("q", "k", "v")},
    **{("layers", name, "scales"): ("layers", None, "ffn") for name in ("gate", "up")},
    **{("layers", name, "scales"): ("layers", None, "embed") for name in ("o", "down")},
    ("layers", "experts", "router"): ("layers", "embed", None),
    **{
        ("layers", "experts", name, "kernel"): ("layers", "experts", "embed", "ffn")
        for name in ("gate", "up")
    },
    ("layers", "experts", "down", "kernel"): ("layers", "experts", "ffn", "embed"),
    **{("layers", "experts", name, "scales"): ("layers", "experts", None, "ffn") for name in ("gate", "up")},
    ("layers", "experts", "down", "scales"): ("layers", "experts", None, "embed"),
}
"""Logical axes of every leaf of the stacked base, by the names on its path."""


def base_sharding(mesh: Mesh, path: tuple) -> NamedSharding:
    """The sharding of one leaf of the base by its key path; layers may be stacked or a tuple.

    Raises:
      KeyError: :data:`BASE_AXES` does not declare the leaf.
    """
    names = tuple(name for name in path_names(path) if name != "value")
    # A key path writes a place in a tuple as [i].
    declared = tuple(name for name in names if not name.startswith("["))
    of_one_layer = declared != names
    if declared not in BASE_AXES:
        raise KeyError(f"no sharding is declared for base leaf {'.'.join(names)}")
    axes = BASE_AXES[declared]
    return _named(mesh, axes[1:] if of_one_layer else axes)


def relaid(base: Base, mesh: Mesh) -> Base:
    """A stacked base in the layout for decoding, divided over another mesh.

    It is a second copy, which is made layer by layer.

    Args:
      mesh: the same devices in the same order, see ``mesh.eval_mesh``.
    """
    places = base_shardings(mesh, jax.eval_shape(unroll, base))

    @functools.partial(jax.jit, out_shardings=places.layers[0])
    def layer(layers: PyTree, index: Int[Array, ""]) -> PyTree:
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, 0, False), layers)

    ends = jax.jit(ends_of, out_shardings=base_shardings(mesh, jax.eval_shape(ends_of, base)))(base)
    ends.layers = nnx.data(tuple(layer(base.layers, np.int32(i)) for i in range(len(places.layers))))
    return with_layout(ends, mesh)


def _named(mesh: Mesh, axes: tuple[str | None, ...]) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*(MESH_AXES[axis] for axis in axes)))


def base_shardings(mesh: Mesh, base: PyTree) -> PyTree:
    """A tree like ``base`` with the sharding of every leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, _: base_sharding(mesh, path), base)


def state_shardings(mesh: Mesh, state: PyTree) -> PyTree:
    """A tree like ``state``, an adapter or a training state, with the sharding of leaves that are replicated.

    Adapters and their optimiser states are small beside the base, so a method declares no axes for them.
    """
    return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of every leaf of a batch: split by rows."""
    return NamedSharding(mesh, PartitionSpec(MESH_AXES["rows"]))


def mesh_layout(mesh: Mesh, cudnn: bool | None = None) -> DeviceLayout:
    """How rows and heads are divided over a mesh.

    Args:
      cudnn: whether the devices have cuDNN's kernels; None asks the devices for their kernels, and they must
        then be present. Otherwise TPUs are taken to have theirs.
    """
    splash = True
    if cudnn is None:
        device = mesh.devices.flat[0]
        cudnn, splash = has_cudnn(device), has_splash(device)
    rows, heads, widths = (MESH_AXES[name] for name in ("rows", "heads", "ffn"))
    return DeviceLayout(mesh, rows, heads, widths, "expert", cudnn, splash)


def with_layout(base: Base, mesh: Mesh | None) -> Base:
    """The same base, whose experts know over which devices they lie; a dense base unchanged.

    Without this XLA would gather the experts' matrices: it does not divide what sorts rows.
    """
    layout = layout_over(mesh)
    for layer in base.layers if base.unrolled else (base.layers,):
        if layer.experts is not None:
            layer.experts.layout = layout
    return base


def place_rows(batch: Batch, layout: DeviceLayout | None) -> Batch:
    """Put a host batch on the devices, split by rows; on the first device where there is no mesh."""
    if layout is None or layout.mesh is None:
        return jax.device_put(batch)
    return place(batch, batch_sharding(layout.mesh))


def layout_over(mesh: Mesh | None, cudnn: bool | None = None) -> DeviceLayout | None:
    """:func:`mesh_layout` where there are several devices; None for one."""
    return None if mesh is None or mesh.size == 1 else mesh_layout(mesh, cudnn)


def attend_over(mesh: Mesh, cudnn: bool | None = None) -> Attend:
    """Attention with kernels where the platform has them; each device computes its own rows and heads.

    Args:
      cudnn: see :func:`mesh_layout`.
    """
    return functools.partial(attention, layout=mesh_layout(mesh, cudnn))
