"""Eight devices are one device, however the mesh divides them."""

import dataclasses

import jax
import numpy as np
import pytest

from milora_jax.adapters.protocol import init_adapter
from milora_jax.adapters.registry import adapter_shape, build_method
from milora_jax.base.modules import frozen_kernels
from milora_jax.config import AdapterSection, MeshSection, TrainSection
from milora_jax.parallel.mesh import make_mesh
from milora_jax.parallel.rules import base_shardings, batch_sharding, state_shardings
from milora_jax.training.step import init_state, make_steps
from tests.models import TINY, random_base
from tests.training.steps import rows

MODEL = dataclasses.replace(TINY, vocab_size=96, num_heads=8, num_kv_heads=8, head_dim=4)
SHAPES = [
    *((8, 1, 1), (1, 8, 1), (1, 1, 8)),
    *((4, 2, 1), (4, 1, 2), (2, 4, 1), (1, 4, 2), (2, 1, 4), (1, 2, 4)),
    (2, 2, 2),
]
SETTINGS = TrainSection(learning_rate=1e-3, coefficient_learning_rate=1e-3)


def losses(devices, steps=3):
    """Of so many steps, and the state after them."""
    base = random_base(MODEL)
    method = build_method(AdapterSection(rank=4))
    adapter = init_adapter(method, jax.random.key(0), adapter_shape(MODEL), frozen_kernels(base))
    state = init_state(adapter, jax.random.key(1), SETTINGS, 10)
    batches = [rows(seed) for seed in range(steps)]
    layout = None
    if devices is not None:

        def layout(tree):
            return state_shardings(devices, tree)

        base = jax.device_put(base, base_shardings(devices, base))
        state = jax.device_put(state, layout(state))
        batches = [jax.device_put(batch, batch_sharding(devices)) for batch in batches]
    programs, found = make_steps(MODEL, SETTINGS, 10, layout), []
    for batch in batches:
        state, metrics = programs.train(state, base, batch)
        found.append((float(metrics.loss), float(metrics.load_balance)))
    return np.array(found), state


@pytest.fixture(scope="module")
def alone():
    return losses(None)[0]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_every_mesh_gives_the_losses_of_one_device(alone, sizes):
    devices = make_mesh(MeshSection(*sizes))
    found, state = losses(devices)
    np.testing.assert_allclose(found, alone, rtol=1e-6)
    places = state_shardings(devices, state)
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
