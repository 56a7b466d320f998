"""Names and shapes of low-rank pairs and routers as tensors of files.

Pairs have the names and the layout of Hugging Face PEFT: a module's path in the transformers model, then
``lora_A.weight`` ``[R, in]``, ``lora_B.weight`` ``[out, R]`` and, for DoRA, ``lora_magnitude_vector``
``[out]`` (PEFT, developer guide "Checkpoint format"). PEFT has no routers. Theirs are ``[7, D]``
``layers.{i}.router.weight``, ``.pool`` ``[D]``, ``.numerator`` ``[7]`` and ``.denominator`` ``[5]``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from milora_jax.adapters.inputs import Shape
from milora_jax.adapters.records import Record
from milora_jax.adapters.router import RouterParams
from milora_jax.base.specs import MODULE_PATHS
from milora_jax.errors import UserError
from milora_jax.types import EXPERTS

NAMES = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
"""PEFT's name of each leaf of a module's record."""

MATRICES = ("a", "b")
"""The leaves that files hold as ``[out, in]`` and this package as ``[in, out]``."""

NOTHING = "every product of lora_A and lora_B is zero: the adapter changes nothing"

Shapes = dict[str, tuple[int, ...]]
"""Shapes of a file's tensors by their names."""


def pair_name(layer: int, module: str, leaf: str) -> str:
    """The name of a module's tensor in a file.

    >>> pair_name(3, "gate", "a")
    'base_model.model.model.layers.3.mlp.gate_proj.lora_A.weight'
    """
    return f"base_model.model.model.layers.{layer}.{MODULE_PATHS[module]}.{NAMES.get(leaf, leaf)}"


def router_name(layer: int, leaf: str) -> str:
    """The name of a router's tensor in a file."""
    return f"layers.{layer}.router.{leaf}"


def pair_shapes(shape: Shape, rank: int, record: type[Record], modules: Sequence[str] = EXPERTS) -> Shapes:
    """Names and shapes in files of pairs of ``rank`` on ``modules``."""
    expected: Shapes = {}
    for module in modules:
        d_in, d_out = shape.dims[module]
        shapes = {"a": (rank, d_in), "b": (d_out, rank), "magnitude": (d_out,)}
        for layer in range(shape.num_layers):
            for field in dataclasses.fields(record):
                expected[pair_name(layer, module, field.name)] = shapes[field.name]
    return expected


def router_shapes(router: RouterParams) -> Shapes:
    """Names and shapes in files of stacked routers, which may be abstract."""
    leaves = {leaf: values.shape for leaf, values in vars(router).items() if values is not None}
    return {
        router_name(layer, leaf): size[:0:-1] for leaf, size in leaves.items() for layer in range(size[0])
    }


def pair_tensors(pairs: Mapping[str, Record]) -> dict[str, np.ndarray]:
    """The tensors of stacked pairs by name, in float32."""
    tensors = {}
    for module, record in pairs.items():
        for field in dataclasses.fields(record):
            leaf = np.asarray(getattr(record, field.name), np.float32)
            for layer, value in enumerate(leaf):
                tensor = value.T if field.name in MATRICES else value
                tensors[pair_name(layer, module, field.name)] = np.ascontiguousarray(tensor)
    return tensors


def router_tensors(params: RouterParams) -> dict[str, np.ndarray]:
    """The tensors of stacked routers by name."""
    tensors = {}
    for leaf, values in vars(params).items():
        for layer, value in enumerate(() if values is None else np.asarray(values, np.float32)):
            tensors[router_name(layer, leaf)] = np.ascontiguousarray(value.T)
    return tensors


def stacked_pairs(
    tensors: Mapping[str, np.ndarray],
    shape: Shape,
    record: type[Record],
    modules: Sequence[str] = EXPERTS,
) -> dict[str, Record]:
    """Make stacked float32 pairs of tensors with the names and shapes of :func:`pair_shapes`."""

    def leaf(module: str, name: str) -> jnp.ndarray:
        every = [tensors[pair_name(layer, module, name)] for layer in range(shape.num_layers)]
        stacked = np.stack([value.T if name in MATRICES else value for value in every])
        return jnp.asarray(stacked.astype(np.float32))

    names = [field.name for field in dataclasses.fields(record)]
    return {module: record(**{name: leaf(module, name) for name in names}) for module in modules}


def stacked_router(tensors: Mapping[str, np.ndarray], like: RouterParams) -> RouterParams:
    """Make stacked routers of tensors with the names and shapes of :func:`router_shapes`.

    Args:
      like: a tree with the same leaves, which may be abstract.
    """
    leaves = {
        leaf: jnp.asarray(np.stack([tensors[router_name(i, leaf)].T for i in range(values.shape[0])]))
        for leaf, values in vars(like).items()
        if values is not None
    }
    if "deviation" in leaves and not (leaves["deviation"] > 0).all():
        raise UserError("a deviation of the router's features is not above 0")
    return dataclasses.replace(like, **leaves)


def changes_nothing(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether no pair has both matrices non-zero, so that every product is zero at any scale."""
    ends = {leaf: f".{name}" for leaf, name in NAMES.items()}
    firsts = (name for name in tensors if name.endswith(ends["a"]))
    pairs = ((name, name.removesuffix(ends["a"]) + ends["b"]) for name in firsts)
    return not any(np.any(tensors[a]) and b in tensors and np.any(tensors[b]) for a, b in pairs)


def require_change(tensors: Mapping[str, np.ndarray], where: str) -> None:
    """Refuse pairs whose products are all zero.

    Raises:
      UserError: all products are zero. In a DoRA only magnitudes could then change anything, and none is ever
        trained so.
    """
    if changes_nothing(tensors):
        raise UserError(f"{where}: {NOTHING}")


def differences(
    tensors: Mapping[str, np.ndarray], expected: Shapes, dtypes: Sequence[str] = ("float32",)
) -> Iterator[str]:
    """Yield a line for every tensor that is missing, unexpected, or of another shape or dtype."""
    if not expected.keys() & tensors.keys():
        found = repr(min(tensors)) if tensors else "none"
        yield f"no tensor has an expected name: found {found}, expected {min(expected)!r}"
        return
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            yield f"tensor {name!r} is missing"
        elif name not in expected:
            yield f"unexpected tensor {name!r}"
        elif tensors[name].shape != expected[name]:
            yield f"tensor {name!r} has shape {list(tensors[name].shape)}, expected {list(expected[name])}"
        elif str(tensors[name].dtype) not in dtypes:
            yield f"tensor {name!r} has dtype {tensors[name].dtype}, expected {' or '.join(dtypes)}"


def require_same(
    tensors: Mapping[str, np.ndarray],
    expected: Shapes,
    where: str,
    dtypes: Sequence[str] = ("float32",),
) -> None:
    """Refuse a file with other tensors than the expected ones.

    Raises:
      UserError: there is a difference; the error names the first.
    """
    for line in differences(tensors, expected, dtypes):
        raise UserError(f"{where}: {line}")
