"""The leaves of a checkpoint: names and types, the plain arrays that store them, and a file of those."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from milora_jax.errors import UserError
from milora_jax.parallel.processes import place
from milora_jax.types import PyTree


@dataclass(frozen=True)
class Leaf:
    """The type of a leaf without its values; ``impl`` is the generator of a typed PRNG key."""

    shape: tuple[int, ...]
    dtype: str
    impl: str | None = None

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by path, such as ``adapter/layers/q/a``, in the order of ``jax.tree.leaves``."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/") or "leaf": leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the tree have the same path: a key contains '/'")
    return named


def to_storage(tree: PyTree) -> tuple[dict[str, Leaf], dict[str, jax.Array]]:
    """The type of each leaf, and the plain arrays for Orbax.

    Keys become their data. Leaves without elements, which Orbax refuses, only have a type. NumPy arrays are
    copied, because their owner may change them during the save.
    """
    described, arrays = {}, {}
    for name, leaf in named_leaves(tree).items():
        if not isinstance(leaf, jax.Array | np.ndarray):
            raise TypeError(f"leaf {name} is a {type(leaf).__name__}: expected an array")
        impl = None
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            impl = str(jax.random.key_impl(leaf))
        described[name] = Leaf(tuple(leaf.shape), str(leaf.dtype), impl)
        array = jax.random.key_data(leaf) if impl else leaf
        if isinstance(array, np.ndarray):
            array = jax.numpy.array(array)
            if array.dtype != leaf.dtype:
                raise TypeError(f"leaf {name} is {leaf.dtype}, which JAX holds as {array.dtype}")
        if array.size:
            arrays[name] = array
    return described, arrays


def require_leaves(directory: Path, saved: dict[str, Leaf], wanted: dict[str, Any]) -> None:
    """Raise one line unless the checkpoint holds exactly the wanted leaves."""
    for name in wanted.keys() | saved.keys():
        if name in saved and name in wanted and wanted[name].sharding is None:
            raise ValueError(f"leaf {name} of the abstract tree has no sharding")
    asked = {name: Leaf(tuple(leaf.shape), str(leaf.dtype)) for name, leaf in wanted.items()}
    problems = [f"{name} is not in it" for name in sorted(asked.keys() - saved.keys())]
    problems += [f"{name} is not expected" for name in sorted(saved.keys() - asked.keys())]
    problems += [
        f"{name} is {saved[name]}, expected {asked[name]}"
        for name in sorted(asked.keys() & saved.keys())
        if (saved[name].shape, saved[name].dtype) != (asked[name].shape, asked[name].dtype)
    ]
    if problems:
        more = f" (and {len(problems) - 1} more differences)" if len(problems) > 1 else ""
        raise UserError(f"checkpoint {directory} does not fit this run: leaf {problems[0]}{more}")


def copied(arrays: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """Copies on the host; every device must hold the arrays whole."""
    return {name: np.array(array.addressable_data(0), order="C") for name, array in arrays.items()}


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write named arrays to a safetensors file.

    Raises:
      OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(arrays, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def read_arrays(path: Path, asked: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Read the arrays of :func:`write_arrays` onto the shardings that are asked for.

    Raises:
      ValueError: an array is missing, or of another shape or dtype.
    """
    from safetensors import safe_open

    loaded = {}
    with safe_open(path, framework="flax") as file:  # NumPy's reader knows no bfloat16
        for name, leaf in asked.items():
            value = file.get_tensor(name)
            if (value.shape, value.dtype) != (leaf.shape, leaf.dtype):
                raise ValueError(f"{name} is {value.dtype}{list(value.shape)}")
            loaded[name] = place(value, leaf.sharding)
    return loaded
