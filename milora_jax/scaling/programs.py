"""The programs of a run on abstract inputs: shapes, dtypes and shardings without data."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from milora_jax.adapters.protocol import Adapter, init_adapter
from milora_jax.adapters.registry import adapter_shape, build_method, require_fits
from milora_jax.base.attention import DeviceLayout
from milora_jax.base.modules import Base, frozen_kernels, unroll
from milora_jax.base.specs import LeafSpec, base_specs
from milora_jax.base.transformer import adapter_decode_layout
from milora_jax.config import Config, ModelSection, TrainSection
from milora_jax.generation.adapter_stack import AdapterStack
from milora_jax.generation.decode import decode_chunk, prefill
from milora_jax.generation.decode_state import empty_state, state_shardings_of
from milora_jax.generation.sampling import Plan, make_sampler
from milora_jax.generation.settings import GenerationSettings
from milora_jax.model_config import ModelConfig
from milora_jax.parallel.rules import (
    attend_over,
    base_sharding,
    batch_sharding,
    layout_over,
    state_shardings,
    with_layout,
)
from milora_jax.training.step import init_state, make_steps
from milora_jax.types import Batch, PyTree

STEPS = 8
"""Decode steps of the compiled chunk; its memory does not depend on their number."""

TOTAL_STEPS = 1000
"""Steps of the learning rate's schedule; the number has no effect on the program's size."""


def train_program(config: Config, model: ModelConfig, mesh: Mesh, prompts: int) -> Any:
    """The lowered training step of a config, rows of ``data.max_length``.

    Args:
      prompts: Z, the most records packed into one row.
    """
    base = abstract_base(model, config.model, mesh)
    state = _abstract_state(config, model, base, config.train)
    state = _placed(state, state_shardings(mesh, state))
    batch = _abstract_batch(mesh, config.train.batch_size, config.data.max_length, prompts)
    steps = make_steps(
        model,
        config.train,
        TOTAL_STEPS,
        lambda state: state_shardings(mesh, state),
        attend_over(mesh, cudnn=False),
    )
    return steps.train.lower(state, base, batch)


def prefill_program(config: Config, model: ModelConfig, mesh: Mesh) -> Any:
    """The lowered prefill of ``eval.batch_size`` prompts of ``data.max_length``."""
    base, adapters = _decoding(config, model, mesh)
    batch = _abstract_batch(mesh, config.eval.batch_size, config.data.max_length)
    length = config.data.max_length + config.eval.max_new_tokens
    layout = layout_over(mesh, cudnn=False) or DeviceLayout()
    return prefill.lower(base, adapters, _number(mesh), batch, model, length, layout)


def decode_program(config: Config, model: ModelConfig, mesh: Mesh) -> Any:
    """The lowered decode steps of a full batch; caches hold ``data.max_length + eval.max_new_tokens``."""
    base, adapters = _decoding(config, model, mesh)
    rows, length = config.eval.batch_size, config.data.max_length + config.eval.max_new_tokens
    settings = [GenerationSettings()]
    sampler = make_sampler(settings, [0], [[0]], model.eos_ids, model.vocab_size, False)
    routed = adapters.method.routes
    layout = layout_over(mesh, cudnn=False)
    dtype = jnp.dtype(config.model.dtype)
    state = jax.eval_shape(lambda: empty_state(model, dtype, sampler, None, rows, length, routed, layout))
    state = _placed(state, state_shardings_of(state, layout) or state_shardings(mesh, state))
    return decode_chunk.lower(base, adapters, state, model, STEPS, Plan.of(settings), layout)


def abstract_base(model: ModelConfig, section: ModelSection, mesh: Mesh, decode: bool = False) -> Base:
    """A base of ``ShapeDtypeStruct`` leaves with the shardings of a run.

    Args:
      decode: in the layout of ``modules.decode_layout``, whose modules are joined on one device only.
    """

    def leaf(spec: LeafSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype(section.dtype))

    joined = decode and mesh.size == 1
    base = jax.tree.map(leaf, base_specs(model, joined, section.quantize))
    if joined:
        here = NamedSharding(mesh, PartitionSpec())
        return _placed(base, jax.tree.map(lambda _: here, base))
    if decode:
        base = jax.eval_shape(unroll, base)
    places = jax.tree_util.tree_map_with_path(lambda path, _: base_sharding(mesh, path), base)
    return with_layout(_placed(base, places), mesh)


def _decoding(config: Config, model: ModelConfig, mesh: Mesh) -> tuple[Base, AdapterStack]:
    """The base in the layout for decoding and one adapter, on every device."""
    base = abstract_base(model, config.model, mesh, decode=True)
    stacked = abstract_base(model, config.model, mesh)
    adapter = _abstract_state(config, model, stacked, config.train).adapter
    adapters = jax.eval_shape(lambda a, b: AdapterStack.single(adapter_decode_layout(a, b)), adapter, base)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return base, _placed(adapters, jax.tree.map(lambda _: everywhere, adapters))


def _abstract_state(config: Config, model: ModelConfig, base: Base, train: TrainSection) -> Any:
    method, shape = build_method(config.adapter), adapter_shape(model)
    require_fits(method, model)

    def fresh(base: Base) -> Any:
        adapter: Adapter = init_adapter(method, jax.random.key(0), shape, frozen_kernels(base))
        return init_state(adapter, jax.random.key(0), train, TOTAL_STEPS)

    return jax.eval_shape(fresh, base)


def _abstract_batch(mesh: Mesh, rows: int, length: int, prompts: int = 1) -> Batch:
    place = batch_sharding(mesh)
    ids: Any = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=place)
    mask: Any = jax.ShapeDtypeStruct((rows, length), jnp.bool_, sharding=place)
    return Batch(ids, ids, ids, mask, mask, prompts=prompts)


def _number(mesh: Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))


def _placed(tree: PyTree, places: PyTree) -> PyTree:
    """The same abstract leaves with their shardings."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, places
    )
