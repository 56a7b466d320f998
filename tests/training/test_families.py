"""Adapters on models with windows, caps and further norms: routes, packing, decoding and beams stay equal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.adapters.protocol import init_adapter
from milora_jax.adapters.registry import adapter_shape, build_method
from milora_jax.base.modules import decode_layout, frozen_kernels
from milora_jax.base.transformer import adapter_decode_layout, forward, unembed
from milora_jax.config import AdapterSection, MeshSection
from milora_jax.generation.adapter_stack import AdapterStack
from milora_jax.generation.beam import beam_search
from milora_jax.generation.engine import Engine
from milora_jax.generation.settings import GenerationSettings
from milora_jax.parallel.mesh import make_mesh
from milora_jax.parallel.rules import base_shardings
from milora_jax.training.loss import adapted_loss
from tests.adapted import row_batch, stack, text
from tests.families import FAMILY_CONFIGS, WINDOW
from tests.models import random_base, small

NEW = 9
LONG = WINDOW + 5


def ready(name, method):
    """A base, its config, and an adapter that changes something."""
    config = FAMILY_CONFIGS[name]
    base = random_base(config)
    made = build_method(AdapterSection(**{**small({"method": method}), "method": method}))
    adapter = init_adapter(made, jax.random.key(0), adapter_shape(config), frozen_kernels(base))
    leaves, structure = jax.tree.flatten(adapter.params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return base, config, adapter.replace(params=jax.tree.unflatten(structure, noisy))


def logits_of(base, config, adapter, batch):
    return unembed(base, config, forward(base, config, batch, adapter=adapter).hidden)


@pytest.mark.thorough
@pytest.mark.parametrize("name", [pytest.param("gemma2", marks=pytest.mark.slow), "gemma3_text"])
@pytest.mark.parametrize("method", ["milora", "p_tuning_v2"])
def test_packed_equals_unpacked(name, method):
    """Records longer than the window, and with a prefix: in a row of several it lies far from the last."""
    base, config, adapter = ready(name, method)
    records = [(text(i, LONG - i), text(10 + i, 3 + i)) for i in range(3)]
    apart = stack(*(row_batch(prompt, answer, length=LONG + 6) for prompt, answer in records))
    rows = [row_batch(prompt, answer) for prompt, answer in records]
    packed = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *rows)
    ids = jnp.concatenate([jnp.full_like(row.segment_ids, i + 1) for i, row in enumerate(rows)], axis=1)

    @jax.jit
    def loss(params, batch):
        return adapted_loss(adapter.replace(params=params), base, config, batch, key=None)[0]

    one, one_grads = jax.value_and_grad(loss)(adapter.params, packed.replace(segment_ids=ids, prompts=3))
    many, many_grads = jax.value_and_grad(loss)(adapter.params, apart)
    np.testing.assert_allclose(one, many, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), one_grads, many_grads)


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "method"), [("gemma3_text", "milora"), ("gemma2", "p_tuning_v2")])
def test_decoding_past_the_window_equals_the_full_forward(name, method):
    base, config, adapter = ready(name, method)
    prompts = [text(2, 4), text(3, LONG)]
    tenants = AdapterStack.single(adapter_decode_layout(adapter, base))
    engine = Engine(decode_layout(base), config, tenants, batch_slots=2, cache_length=64)
    settings = GenerationSettings(max_new_tokens=NEW, ignore_eos=True)
    made = [engine.submit([int(t) for t in prompt], settings) for prompt in prompts]
    engine.run()
    for request, prompt in zip(made, prompts, strict=True):
        new = np.array(request.tokens[0])
        found = logits_of(base, config, adapter, row_batch(prompt, new))[0, len(prompt) - 1 : -1]
        np.testing.assert_array_equal(np.argmax(found, axis=-1), new)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["gemma3_text"])
def test_beams_past_the_window_have_the_score_of_their_tokens(name):
    base, config, adapter = ready(name, "milora")
    prompts = [text(2, 4), text(3, LONG)]
    tenants = AdapterStack.single(adapter_decode_layout(adapter, base))
    settings = GenerationSettings(num_beams=3, max_new_tokens=NEW, ignore_eos=True)
    asked = [[int(t) for t in prompt] for prompt in prompts]
    for found, prompt in zip(
        beam_search(decode_layout(base), config, tenants, asked, settings), prompts, strict=True
    ):
        logits = logits_of(base, config, adapter, row_batch(prompt, np.array(found.tokens)))[0]
        logprobs = np.asarray(jax.nn.log_softmax(logits, axis=-1))[len(prompt) - 1 : -1]
        score = np.take_along_axis(logprobs, np.array(found.tokens)[:, None], axis=1).mean()
        np.testing.assert_allclose(found.score, score, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_sharded_equals_unsharded(name):
    base, config, adapter = ready(name, "milora")
    batch = stack(*(row_batch(text(i, LONG), text(10 + i, 4)) for i in range(4)))

    def loss(params, base):
        return adapted_loss(adapter.replace(params=params), base, config, batch, key=None)[0]

    step = jax.jit(jax.value_and_grad(loss))
    expected, expected_grads = step(adapter.params, base)
    mesh = make_mesh(MeshSection(2, 4, 1))
    found, grads = step(adapter.params, jax.device_put(base, base_shardings(mesh, base)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, expected_grads)
