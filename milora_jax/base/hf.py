"""A LLaMA-family base from a Hugging Face directory, leaf by leaf.

Tensors are read one at a time from ``model.safetensors`` or from the shards its index names,
transposed to ``[in, out]``, cast, and copied into their place in a stacked or joined leaf, so that beside the
model the process never holds more than one tensor and, where the devices copy it, one leaf. Nothing is
ever left at an initial value: every expected tensor must be there, with the expected shape, and no
other.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from milora_jax.base.modules import Base, JoinedLayer, Layer, Linear
from milora_jax.config import ModelConfig
from milora_jax.errors import UserError
from milora_jax.types import EXPERTS, GROUPS

MODULE_PATHS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""Where Hugging Face keeps each of the seven modules inside a layer."""

ATTENTION = ("q", "k", "v", "o")
NORM_PATHS = ("input_layernorm.weight", "post_attention_layernorm.weight")

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
ALIGNMENT = 64
"""Bytes to which XLA aligns buffers: a CPU device takes a host array so aligned as it is, uncopied."""

IGNORED_SUFFIX = "rotary_emb.inv_freq"
"""Old checkpoints store the rotary frequencies; they follow from the config."""


@dataclass(frozen=True)
class Part:
    """One tensor of the files, and the view of a leaf that it fills.

    Attributes:
      name: in the files.
      index: what the leaf is indexed with.
    """

    name: str
    index: tuple[Any, ...] = ()


@dataclass(frozen=True)
class LeafSpec:
    """One leaf of the base and the tensors that fill it.

    Attributes:
      shape: of the leaf.
      parts: the tensors: one per layer for a stacked leaf, one per module for a joined one.
      transposed: whether the files hold it ``[out, in]``.
    """

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    transposed: bool = False


def base_specs(config: ModelConfig, decode: bool = False) -> Base:
    """A Base whose leaves are LeafSpecs: the one table of names and shapes.

    Args:
      decode: a tuple of joined layers, as ``modules.decode_layout`` makes it, instead of a stacked one.
    """
    count = config.num_layers

    def plain(name: str, *shape: int, transposed: bool = False) -> LeafSpec:
        return LeafSpec(shape, (Part(name),), transposed)

    def stacked(suffix: str, *shape: int, transposed: bool = False) -> LeafSpec:
        parts = tuple(Part(f"model.layers.{i}.{suffix}", (i,)) for i in range(count))
        return LeafSpec((count, *shape), parts, transposed)

    def biased(name: str) -> bool:
        return config.attention_bias if name in ATTENTION else config.mlp_bias

    def stacked_layer() -> Layer:
        modules = {}
        for name in EXPERTS:
            path, (d_in, d_out) = MODULE_PATHS[name], config.module_dims[name]
            bias = stacked(f"{path}.bias", d_out) if biased(name) else None
            modules[name] = Linear(stacked(f"{path}.weight", d_in, d_out, transposed=True), bias)
        attention_norm, feedforward_norm = (stacked(name, config.hidden_size) for name in NORM_PATHS)
        return Layer(attention_norm, feedforward_norm, modules)

    def joined_layer(prefix: str) -> JoinedLayer:
        groups, widths = [], []
        for names in GROUPS:
            d_in = config.module_dims[names[0]][0]
            outputs = tuple(config.module_dims[name][1] for name in names)
            edges = (0, *accumulate(outputs))

            def joined(
                kind: str,
                *front: int,
                transposed: bool = False,
                names: tuple[str, ...] = names,
                edges: tuple[int, ...] = edges,
            ) -> LeafSpec:
                parts = tuple(
                    Part(f"{prefix}.{MODULE_PATHS[name]}.{kind}", (..., slice(*ends)))
                    for name, ends in zip(names, pairwise(edges), strict=True)
                )
                return LeafSpec((*front, edges[-1]), parts, transposed)

            bias = joined("bias") if biased(names[0]) else None
            groups.append(Linear(joined("weight", d_in, transposed=True), bias))
            widths.append(outputs)
        attention_norm, feedforward_norm = (
            plain(f"{prefix}.{name}", config.hidden_size) for name in NORM_PATHS
        )
        return JoinedLayer(attention_norm, feedforward_norm, tuple(groups), tuple(widths))

    layers = tuple(joined_layer(f"model.layers.{i}") for i in range(count)) if decode else stacked_layer()
    vocab, width = config.vocab_size, config.hidden_size
    head = None if config.tie_embeddings else plain("lm_head.weight", width, vocab, transposed=True)
    return Base(
        plain("model.embed_tokens.weight", vocab, width), layers, plain("model.norm.weight", width), head
    )


def load_leaves(
    directory: Path,
    config: ModelConfig,
    dtype: str,
    place: Callable[[np.ndarray, " tuple"], jax.Array],
    decode: bool = False,
) -> Base:
    """Read every leaf of the base.

    Args:
      decode: in the layout of ``modules.decode_layout``, which then need not be made of another.
      place: ``place(host_array, key_path)`` puts a finished leaf on the devices.

    Raises:
      UserError: for a missing, extra or misshapen tensor, a pickle, or a damaged file.
    """
    target = jnp.dtype(dtype)
    files = _files_by_tensor(directory)
    specs = base_specs(config, decode)
    expected = {part.name for spec in jax.tree.leaves(specs) for part in spec.parts}
    found = {name for name in files if not name.endswith(IGNORED_SUFFIX)}
    if config.tie_embeddings:
        found.discard("lm_head.weight")  # some tied checkpoints store the shared matrix twice
    _require_same_names(directory, expected, found)

    def read(path: tuple, spec: LeafSpec) -> jax.Array:
        leaf = _aligned_empty(spec.shape, target)
        for part in spec.parts:
            _read_into(leaf[part.index], files[part.name], part.name, spec.transposed)
        # Devices copy in the background: without waiting, finished leaves pile up in host memory.
        return jax.block_until_ready(place(leaf, path))

    return jax.tree_util.tree_map_with_path(read, specs)


def place_on_default_device(leaf: np.ndarray, path: tuple) -> jax.Array:
    """The simplest ``place`` of :func:`load_leaves`: the whole leaf on one device."""
    del path
    return jax.device_put(leaf)


def save_base(directory: Path, base: Base, config: ModelConfig, dtype: str) -> None:
    """Write ``model.safetensors`` in Hugging Face's names and layout; :func:`load_leaves` reads it."""
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray] = {}

    def write(spec: LeafSpec, leaf: jax.Array) -> None:
        host = np.asarray(leaf).astype(jnp.dtype(dtype))
        for part in spec.parts:
            tensor = host[part.index]
            tensors[part.name] = np.ascontiguousarray(tensor.T if spec.transposed else tensor)

    jax.tree.map(write, base_specs(config), base)
    save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt"})


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _files_by_tensor(directory: Path) -> dict[str, Path]:
    """The file that holds each tensor, by the headers of all files."""
    if not directory.is_dir():
        raise UserError(f"model.path {str(directory)!r}: no such directory, expected a Hugging Face model")
    files: dict[str, Path] = {}
    for path, only in _weight_files(directory):
        with _opened(path) as tensors:
            names = set(tensors.keys())
        if only is not None and names != only:
            wrong = sorted(names ^ only)[0]
            raise UserError(f"{path}: tensor {wrong!r} is in the file or in the index, not in both")
        files.update(dict.fromkeys(names, path))
    return files


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, open for the ``with`` block.

    It is mapped into memory, and every page that was read counts as the process's own until it is
    closed: a file kept open while all of it is read doubles the peak.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def _weight_files(directory: Path) -> Iterator[tuple[Path, set[str] | None]]:
    """Every weight file with the tensors the index gives it; None where there is no index."""
    index_path, single = directory / INDEX_NAME, directory / WEIGHTS_NAME
    if single.is_file():
        yield single, None
        return
    if not index_path.is_file():
        pickles = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        found = f"; found {pickles[0]}, but pickles are never loaded" if pickles else ""
        raise UserError(f"{directory}: expected {WEIGHTS_NAME} or {INDEX_NAME}{found}")
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index_path}: expected a non-empty object 'weight_map'")
    by_file: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        plain = isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name
        if not plain:
            raise UserError(
                f"{index_path}: tensor {tensor!r} is in {name!r}: "
                "expected a safetensors file of this directory"
            )
        by_file.setdefault(name, set()).add(tensor)
    for name in sorted(by_file):
        if not (directory / name).is_file():
            raise UserError(f"{index_path}: names {name!r}, which is missing")
        yield directory / name, by_file[name]


def _require_same_names(directory: Path, expected: set[str], found: set[str]) -> None:
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing:
        raise UserError(f"{directory}: tensor {missing[0]!r} is missing ({len(missing)} in all)")
    if extra:
        raise UserError(
            f"{directory}: unexpected tensor {extra[0]!r} ({len(extra)} in all); "
            "config.json does not ask for it"
        )


def _read_into(part: np.ndarray, path: Path, name: str, transposed: bool) -> None:
    """Copy one tensor into its place, checking its shape and that it holds floating point numbers."""
    with _opened(path) as tensors:
        tensor = tensors.get_tensor(name)
    shape = part.shape[::-1] if transposed else part.shape
    if tensor.shape != shape:
        raise UserError(f"{path}: tensor {name!r} has shape {tensor.shape}, expected {shape}")
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise UserError(f"{path}: tensor {name!r} has dtype {tensor.dtype}, expected a floating type")
    np.copyto(part, tensor.T if transposed else tensor, casting="unsafe")


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, hostile nesting
        raise UserError(f"{path}: not readable JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value
