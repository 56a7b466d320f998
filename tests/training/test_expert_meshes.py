"""A base with experts on several devices: every division gives the losses, gradients and tokens of one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.adapters.protocol import init_adapter
from milora_jax.adapters.registry import adapter_shape, build_method
from milora_jax.base.hf import load_leaves
from milora_jax.base.load import load_base
from milora_jax.base.modules import decode_layout, frozen_kernels
from milora_jax.base.transformer import adapter_decode_layout
from milora_jax.config import AdapterSection, MeshSection
from milora_jax.errors import UserError
from milora_jax.generation.adapter_stack import AdapterStack
from milora_jax.generation.engine import Engine
from milora_jax.generation.settings import GenerationSettings
from milora_jax.parallel.mesh import check_divides, make_mesh
from milora_jax.parallel.rules import base_sharding, base_shardings, layout_over, relaid, with_layout
from milora_jax.training.loss import adapted_loss
from tests.adapted import row_batch, stack, text
from tests.families import EXPERT_CONFIGS
from tests.models import TINY, random_base, small, write_hf_directory

MODEL = dataclasses.replace(EXPERT_CONFIGS["qwen3_moe"], vocab_size=96)


def ready(config, method="milora"):
    base = random_base(config)
    made = build_method(AdapterSection(**{**small({"method": method}), "method": method}))
    adapter = init_adapter(made, jax.random.key(0), adapter_shape(config), frozen_kernels(base))
    leaves, structure = jax.tree.flatten(adapter.params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return base, adapter.replace(params=jax.tree.unflatten(structure, noisy))


def placed(base, mesh):
    return with_layout(jax.device_put(base, base_shardings(mesh, base)), mesh)


def step_of(adapter, config, batch, remat):
    def loss(params, base):
        changed = adapter.replace(params=params)
        return adapted_loss(changed, base, config, batch, key=None, remat=remat)[0]

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("sizes", "remat"),
    [
        pytest.param({"data": 2, "expert": 2, "tensor": 2}, "none", id="data=2,expert=2,tensor=2"),
        pytest.param({"fsdp": 2, "expert": 4}, "products", id="expert=4"),
        pytest.param({"expert": 8}, "full", id="expert=8"),
        pytest.param({"data": 4, "tensor": 2}, "full", id="no expert axis"),
    ],
)
def test_a_step_on_a_mesh_equals_that_of_one_device(sizes, remat):
    base, adapter = ready(MODEL)
    batch = stack(*(row_batch(text(i, 6 + i), text(10 + i, 4), length=20) for i in range(8)))
    step = step_of(adapter, MODEL, batch, remat)
    expected, expected_grads = step(adapter.params, base)
    mesh = make_mesh(MeshSection(**{"data": 1, **sizes}))
    check_divides(mesh, MODEL, {"train.batch_size": 8})
    found, grads = step(adapter.params, placed(base, mesh))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, expected_grads)


@pytest.mark.thorough
def test_no_device_gathers_experts_that_are_not_its_own():
    base, adapter = ready(MODEL)
    batch = stack(*(row_batch(text(i, 6), text(10 + i, 4)) for i in range(8)))
    mesh = make_mesh(MeshSection(data=1, expert=8))
    laid = placed(base, mesh)
    assert laid.layers.experts.gate.kernel[...].addressable_shards[0].data.shape == (2, 1, 32, 48)
    program = step_of(adapter, MODEL, batch, "none").lower(adapter.params, laid).compile().as_text()
    whole, own = "f32[8,32,48]", "f32[1,32,48]"
    assert own in program
    assert whole not in program


def test_files_are_read_onto_the_devices_of_their_experts(tmp_path):
    write_hf_directory(tmp_path, MODEL, tokenizer=False)
    mesh = make_mesh(MeshSection(data=1, fsdp=2, expert=2, tensor=2))
    for quantize in ("none", "int8"):
        split = load_leaves(
            tmp_path, MODEL, "float32", lambda path: base_sharding(mesh, path), quantize=quantize
        )
        whole, _ = load_base(tmp_path, quantize=quantize)
        kernel = split.layers.experts.down.kernel[...]
        assert kernel.addressable_shards[0].data.shape == (2, 4, 24, 16)
        jax.tree.map(np.testing.assert_array_equal, split, whole)


@pytest.mark.thorough
@pytest.mark.parametrize("sizes", [{"data": 2, "expert": 4}, {"tensor": 2, "expert": 4}])
def test_an_engine_on_a_mesh_gives_the_tokens_of_one_device(sizes):
    base, adapter = ready(MODEL)
    mesh = make_mesh(MeshSection(**{"data": 1, **sizes}))
    settings = GenerationSettings(max_new_tokens=6, ignore_eos=True)
    made = []
    for mine, layout in (
        (decode_layout(base), None),
        (relaid(placed(base, mesh), mesh), layout_over(mesh)),
    ):
        params = jax.device_put(adapter, mine.everywhere) if layout else adapter
        tenants = AdapterStack.single(adapter_decode_layout(params, mine))
        engine = Engine(mine, MODEL, tenants, batch_slots=8, cache_length=32, prefill_rows=8, layout=layout)
        asked = [engine.submit([int(t) for t in text(i, 4 + i)], settings) for i in range(8)]
        engine.run()
        made.append([request.tokens[0] for request in asked])
    assert made[0] == made[1]
    assert len({tuple(tokens) for tokens in made[0]}) > 1


@pytest.mark.parametrize(
    ("model", "expert", "message"),
    [
        (
            dataclasses.replace(MODEL, num_experts=6),
            4,
            "num_experts is 6: expected a multiple of",
        ),
        (TINY, 2, "num_experts is 0: expected a multiple of mesh.expert = 2, above 0"),
    ],
)
def test_experts_that_do_not_divide_over_the_mesh_are_refused(model, expert, message):
    mesh = make_mesh(MeshSection(data=-1, expert=expert))
    with pytest.raises(UserError, match=message):
        check_divides(mesh, dataclasses.replace(model, vocab_size=96), {})


def test_rows_are_divided_over_the_experts_axis_too():
    mesh = make_mesh(MeshSection(data=2, expert=4))
    with pytest.raises(UserError, match="a multiple of mesh data x fsdp x expert = 8"):
        check_divides(mesh, MODEL, {"train.batch_size": 4})


@pytest.mark.thorough
def test_a_routers_gradient_passes_through_the_base_experts():
    """The base's router is frozen, but its probabilities carry a gradient to earlier layers."""
    base, adapter = ready(dataclasses.replace(MODEL, norm_topk_prob=False), "lora")
    batch = stack(row_batch(text(1, 6), text(2, 4)))
    _, grads = step_of(adapter, MODEL, batch, "none")(adapter.params, base)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(grads))
