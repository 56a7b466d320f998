"""Training and decoding on a quantised base are those on a plain base with the decoded values."""

import dataclasses

import jax
import numpy as np
import pytest

from milora_jax.adapters.protocol import init_adapter
from milora_jax.adapters.registry import adapter_shape, build_method
from milora_jax.base import quantized
from milora_jax.base.modules import decode_layout, frozen_kernels
from milora_jax.base.transformer import adapter_decode_layout
from milora_jax.config import AdapterSection, MeshSection
from milora_jax.generation.adapter_stack import AdapterStack
from milora_jax.generation.engine import Engine
from milora_jax.generation.settings import GenerationSettings
from milora_jax.parallel.mesh import make_mesh
from milora_jax.parallel.rules import base_shardings, batch_sharding, state_shardings
from milora_jax.training.step import init_state, make_steps
from tests.adapted import text
from tests.models import QUANTIZABLE, decoded_base, quantized_base, small
from tests.programs import compiled, largest_floats
from tests.training.steps import SETTINGS, rows

TOTAL = 20


def fresh(base, method="milora"):
    settings = AdapterSection(method=method, **small({"method": method}))
    kernels = frozen_kernels(base)
    adapter = init_adapter(build_method(settings), jax.random.key(0), adapter_shape(QUANTIZABLE), kernels)
    return init_state(adapter, jax.random.key(1), SETTINGS, TOTAL)


def step(layout=None):
    return make_steps(QUANTIZABLE, SETTINGS, TOTAL, layout).train


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("quantize", "method"),
    [
        ("nf4", "milora"),
        pytest.param("int8", "milora", marks=pytest.mark.slow),
        pytest.param("nf4", "midora", marks=pytest.mark.slow),
    ],
)
def test_a_step_is_that_on_the_decoded_kernels(quantize, method):
    base = quantized_base(QUANTIZABLE, quantize)
    found, expected = (step()(fresh(b, method), b, rows()) for b in (base, decoded_base(base)))
    moments = [(s.omega_state, m) for s, m in (found, expected)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *moments)
    np.testing.assert_allclose(found[1].loss, expected[1].loss, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_a_step_writes_no_whole_kernel(monkeypatch, quantize):
    """In tiles of 128, of the widest matrices no decoded copy is in the compiled step."""
    monkeypatch.setattr(quantized, "TILE_BYTES", 1)
    wide = dataclasses.replace(QUANTIZABLE, hidden_size=256, intermediate_size=2048)
    base = quantized_base(wide, quantize)
    adapter = init_adapter(
        build_method(AdapterSection(rank=4)), jax.random.key(0), adapter_shape(wide), frozen_kernels(base)
    )
    state = init_state(adapter, jax.random.key(1), SETTINGS, TOTAL)
    batch, whole = rows(), 256 * 2048
    steps = make_steps(wide, SETTINGS, TOTAL)
    assert wide.num_layers * batch.tokens.size < 256, "activations would be as large as a kernel"
    assert largest_floats(compiled(steps.train.lower(state, base, batch))) < whole
    assert largest_floats(compiled(steps.train.lower(state, decoded_base(base), batch))) >= whole


def continued(base, merge=False):
    """Greedy tokens of two prompts."""
    adapter = fresh(base).adapter
    noisy = jax.tree.map(lambda leaf: leaf + 0.1, adapter.params)
    tenants = AdapterStack.single(adapter_decode_layout(dataclasses.replace(adapter, params=noisy), base))
    engine = Engine(decode_layout(base), QUANTIZABLE, tenants, batch_slots=2, cache_length=64, merge=merge)
    made = [
        engine.submit([int(t) for t in text(seed, 9)], GenerationSettings(max_new_tokens=8, ignore_eos=True))
        for seed in (1, 2)
    ]
    engine.run()
    return [request.tokens[0] for request in made]


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_decoding_gives_the_tokens_of_the_decoded_kernels(quantize):
    base = quantized_base(QUANTIZABLE, quantize)
    expected = continued(decoded_base(base))
    assert continued(base) == expected
    assert continued(base, merge=True) == expected
    assert len(set(expected[0] + expected[1])) > 3


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["int8", "nf4"])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2)], ids=str)
def test_every_mesh_gives_the_losses_of_one_device(sizes, quantize):
    devices = make_mesh(MeshSection(*sizes))

    def layout(tree):
        return state_shardings(devices, tree)

    base = quantized_base(QUANTIZABLE, quantize)
    state, batch = fresh(base), rows()
    _, alone = step()(fresh(base), base, batch)
    base = jax.device_put(base, base_shardings(devices, base))
    state = jax.device_put(state, layout(state))
    _, spread = step(layout)(state, base, jax.device_put(batch, batch_sharding(devices)))
    np.testing.assert_allclose(
        [spread.loss, spread.load_balance], [alone.loss, alone.load_balance], rtol=1e-6
    )
