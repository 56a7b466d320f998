"""The models and adapters of the benchmarks: read from a directory, or random ones made on the device."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from milora_jax.adapters.inputs import Kernels, ProjectionGroup
from milora_jax.adapters.protocol import Adapter, Method, init_adapter
from milora_jax.adapters.registry import adapter_shape, build_method, require_fits
from milora_jax.base.hf_config import write_model_config
from milora_jax.base.known import SHAPES
from milora_jax.base.load import load_base
from milora_jax.base.modules import Base, frozen_kernels
from milora_jax.base.quantized import bits_of
from milora_jax.base.specs import LeafSpec, base_specs
from milora_jax.config import AdapterSection
from milora_jax.errors import UserError
from milora_jax.model_config import ModelConfig
from milora_jax.shapes import Array, Float, Int
from milora_jax.types import GROUPS, PyTree

RANDOM = "random:"

RECOMPUTED = "-recomputed"
"""Suffix of a method whose norms are computed again at every token, as in PEFT."""


def load_model(name: str, dtype: str, *, decode: bool, quantize: str = "none") -> tuple[Base, ModelConfig]:
    """Load a base.

    Args:
      name: a Hugging Face directory, or ``random:`` and one of :data:`SHAPES`.
      decode: in the layout for decoding instead of the one for training.
      quantize: one of ``config.QUANTIZE``.
    """
    if not name.startswith(RANDOM):
        if not Path(name).is_dir():
            raise UserError(f"--model {name!r}: no such directory, and not {RANDOM}{'|'.join(SHAPES)}")
        return load_base(name, dtype, decode=decode, quantize=quantize)
    shape = name.removeprefix(RANDOM)
    if shape not in SHAPES:
        raise UserError(f"--model {name!r}: expected {RANDOM} and one of {', '.join(SHAPES)}")
    return random_base(SHAPES[shape], dtype, decode=decode, quantize=quantize), SHAPES[shape]


def random_base(config: ModelConfig, dtype: str, *, decode: bool, quantize: str = "none") -> Base:
    """Draw random weights where they stay, in the given layout: nothing is held twice."""
    specs, structure = jax.tree.flatten(base_specs(config, decode, quantize))
    keys = jax.random.split(jax.random.key(0), len(specs))

    @jax.jit(static_argnames="spec")
    def draw(key: Array, spec: LeafSpec) -> Array:
        kind = spec.dtype(dtype)
        if "norm" in spec.parts[0].name:
            return jnp.ones(spec.shape, kind)
        if spec.encoded is None:
            return 0.02 * jax.random.normal(key, spec.shape, kind)
        if spec.encoded.scales:
            return jnp.full(spec.shape, 0.04 / spec.encoded.scheme.largest, kind)
        whole = jnp.iinfo(kind)
        return jax.random.randint(key, spec.shape, whole.min, whole.max + 1, jnp.int32).astype(kind)

    def leaf(spec: LeafSpec, key: Array) -> Array:
        return draw(key, dataclasses.replace(spec, parts=spec.parts[:1]))  # one compilation for all parts

    return jax.tree.unflatten(structure, [leaf(*pair) for pair in zip(specs, keys, strict=True)])


def peer_directory(stack: ExitStack, name: str, config: ModelConfig, dtype: str) -> Path:
    """The model's directory for a peer: the directory itself, or one with ``config.json`` alone.

    Args:
      stack: keeps a new directory until it is closed.
      name: see :func:`load_model`.
    """
    if not name.startswith(RANDOM):
        return Path(name)
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    described = write_model_config(config, bos_id=1, dtype=dtype)
    (directory / "config.json").write_text(json.dumps(described), encoding="utf-8")
    return directory


def random_adapter(base: Base, config: ModelConfig, settings: AdapterSection, seed: int) -> Adapter:
    """Make an adapter whose matrices are not zero, as after training, in the stacked layout."""
    method = build_method(settings)
    require_fits(method, config)
    adapter = _fresh(base, method, config, jnp.int32(seed))
    leaves, structure = jax.tree.flatten(adapter.params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    moved = [
        leaf + 0.01 * jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return dataclasses.replace(adapter, params=jax.tree.unflatten(structure, moved))


@functools.partial(jax.jit, static_argnames=("method", "config"))
def _fresh(base: Base, method: Method, config: ModelConfig, seed: Int[Array, ""]) -> Adapter:
    """A new adapter; one program makes those of all tenants."""
    return init_adapter(method, jax.random.key(seed), adapter_shape(config), _kernels(base))


def _kernels(base: Base) -> Kernels:
    """The kernels of a base in either layout; under ``jit`` those that are not read cost nothing."""
    if not base.unrolled:
        return frozen_kernels(base)
    kernels = {}
    for place, names in enumerate(GROUPS):
        if base.layers[0].experts is not None and place > 1:
            continue  # no method that fits such a base reads them
        columns = zip(*(layer.frozen(place) for layer in base.layers), strict=True)
        for name, leaves in zip(names, columns, strict=True):
            kernels[name] = jnp.stack([leaf.kernel for leaf in leaves])
    return kernels


@dataclasses.dataclass(frozen=True)
class Recomputed(Method):
    """A method that is not prepared for decoding: work on frozen weights alone is repeated at every token.

    Without the barrier XLA would hoist that work out of the loop.
    """

    method: Any = None

    def adapt(self, params: PyTree, group: ProjectionGroup) -> tuple[Float[Array, "B T _"], ...]:
        """Adapt as the method does."""
        x, params, frozen = jax.lax.optimization_barrier((group.x, params, group.frozen))
        return self.method.adapt(params, dataclasses.replace(group, x=x, frozen=frozen))


def bytes_of(tree: PyTree) -> int:
    """Bytes of all leaves where they are; on a CPU a number of four bits takes a byte."""
    packed = jax.default_backend() != "cpu"
    return sum(
        leaf.size * bits_of(leaf.dtype) // 8 if packed else leaf.nbytes for leaf in jax.tree.leaves(tree)
    )


def streamed_bytes(base: Base, config: ModelConfig, rows: int) -> int:
    """Bytes of the base that a decode step reads: all but the embedding, of which it reads a few rows, and
    the experts that no row chooses, if every choice is as probable as any other.

    Args:
      base: with its layers as a tuple.
    """
    tied = base.head is None
    size = bytes_of(base) - (0 if tied else bytes_of(base.embedding[...]))
    if not config.num_experts:
        return size
    unread = (1 - config.experts_per_token / config.num_experts) ** rows
    experts = [layer.experts for layer in base.layers]
    return size - round(unread * sum(bytes_of((each.into, each.down)) for each in experts))
