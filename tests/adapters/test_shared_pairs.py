"""Adapters on a base with experts: gate, up and down have one pair each, which all experts share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.adapters.protocol import init_adapter
from milora_jax.adapters.registry import METHOD_CLASSES, METHODS, adapter_shape, build_method, require_fits
from milora_jax.base.load import load_base
from milora_jax.base.modules import Base, Experts, Layer, Linear, decode_layout, frozen_kernels
from milora_jax.base.transformer import adapter_decode_layout, forward, unembed
from milora_jax.config import AdapterSection
from milora_jax.errors import UserError
from milora_jax.generation.adapter_stack import AdapterStack
from milora_jax.generation.bank import Bank
from milora_jax.generation.engine import Engine
from milora_jax.generation.merge import merged_base
from milora_jax.generation.settings import GenerationSettings
from milora_jax.storage.imported import read_peft_adapter
from milora_jax.storage.peft import require_unfused
from milora_jax.types import EXPERTS, FEEDFORWARD
from tests.adapted import row_batch, stack, text
from tests.families import EXPERT_CONFIGS
from tests.models import random_base, small, write_hf_directory

MODEL = EXPERT_CONFIGS["qwen3_moe"]
BASE = random_base(MODEL)
SHARED = [name for name in METHODS if METHOD_CLASSES[name].additive]
REFUSED = [name for name in METHODS if name not in SHARED]
BATCH = stack(row_batch(text(0, 7), text(1, 5)), row_batch(text(2, 7), text(3, 5)))


def made(seed=0, change=True, model=MODEL, base=BASE, **settings):
    method = build_method(AdapterSection(**{**small(settings), **settings}))
    adapter = init_adapter(method, jax.random.key(seed), adapter_shape(model), frozen_kernels(base))
    leaves, structure = jax.tree.flatten(adapter.params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [leaf + 0.2 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
    return adapter.replace(params=jax.tree.unflatten(structure, noisy)) if change else adapter


@jax.jit
def hidden_of(base, batch, adapter, more):
    return forward(base, MODEL, batch, adapter=adapter, **more).hidden


def run(adapter, batch=BATCH, base=BASE, **more):
    return hidden_of(base, batch, adapter, more)


def changed_weights(adapter, weights=None):
    """The base with the change of every pair added to every matrix, each expert of it, in numpy."""
    change = adapter.method.weight_change(adapter.params)

    def linear(frozen, name):
        record = change.records[name]
        delta = change.scale * np.einsum("ldr,lro->ldo", np.asarray(record.a), np.asarray(record.b))
        if weights is not None:
            delta = delta * weights[:, EXPERTS.index(name), None, None]
        kernel = np.asarray(frozen.kernel[...])
        delta = delta[:, None] if name in FEEDFORWARD else delta
        return Linear(jnp.asarray(kernel + delta), None if frozen.bias is None else frozen.bias[...])

    layers, experts = BASE.layers, BASE.layers.experts
    into = tuple(linear(getattr(experts, name), name) for name in ("gate", "up"))
    modules = {name: linear(getattr(layers, name), name) for name in ("q", "k", "v", "o")}
    merged = Experts(experts.router[...], into, linear(experts.down, "down"))
    return Base(
        BASE.embedding[...], Layer(layers.norms, modules, merged), BASE.final_norm[...], BASE.head[...]
    )


@pytest.mark.thorough
@pytest.mark.parametrize("normed", [True, False])
def test_a_shared_pair_is_the_same_change_of_every_experts_weight(normed):
    """Also where the weights of a token's experts do not sum to 1."""
    model = dataclasses.replace(MODEL, norm_topk_prob=normed)
    adapter = made(method="lora", alpha=6.0)
    found = forward(BASE, model, BATCH, adapter=adapter).hidden
    expected = forward(changed_weights(adapter), model, BATCH).hidden
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert float(jnp.abs(forward(BASE, model, BATCH).hidden - expected).max()) > 0.1


def test_milora_with_seven_experts_of_weight_one_is_lora_to_the_bit():
    lora = made(method="lora")
    milora = made(method="milora", top_k=7, gate="straight_through")
    milora = milora.replace(params=dataclasses.replace(milora.params, experts=lora.params))
    np.testing.assert_array_equal(run(milora), run(lora))


@pytest.mark.thorough
def test_an_expert_that_a_route_does_not_choose_has_no_gradient():
    adapter = made(method="milora", top_k=3)
    weights = np.zeros((2, 2, 1, 7), np.float32)
    weights[..., [0, 4, 6]] = 1.0  # q, gate, down
    route = jnp.asarray(weights)

    def loss(params):
        return jnp.sum(jnp.sin(run(adapter.replace(params=params), route=route)))

    grads = jax.grad(loss)(adapter.params).experts
    sizes = {name: float(jnp.abs(grads[name].a).max()) for name in grads}
    assert {name for name, size in sizes.items() if size > 0} == {"q", "gate", "down"}
    expected = forward(changed_weights(adapter, weights[:, 0, 0]), MODEL, BATCH).hidden
    np.testing.assert_allclose(run(adapter, route=route), expected, atol=2e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("method", SHARED)
def test_a_method_trains_and_decodes_on_experts(method):
    """Finite gradients; and the tokens of prefill and cached steps are those of the full pass."""
    adapter = made(method=method)

    def loss(params):
        return jnp.mean(run(adapter.replace(params=params)) ** 2)

    grads = jax.grad(loss)(adapter.params)
    trained = [leaf for leaf in jax.tree.leaves(grads) if leaf.size]
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in trained)
    assert max(float(jnp.abs(leaf).max()) for leaf in trained) > 0
    prompts = [text(4, 5), text(5, 9)]
    tenants = AdapterStack.single(adapter_decode_layout(adapter, BASE))
    engine = Engine(decode_layout(BASE), MODEL, tenants, batch_slots=2, cache_length=32)
    settings = GenerationSettings(max_new_tokens=6, ignore_eos=True)
    asked = [engine.submit([int(t) for t in prompt], settings) for prompt in prompts]
    engine.run()
    for request, prompt in zip(asked, prompts, strict=True):
        new = np.array(request.tokens[0])
        logits = unembed(BASE, MODEL, run(adapter, row_batch(prompt, new)))[0, len(prompt) - 1 : -1]
        np.testing.assert_array_equal(np.argmax(logits, axis=-1), new)


@pytest.mark.thorough
def test_the_route_of_prefill_is_that_of_training():
    adapter = made(method="milora")
    prompt = text(6, 8)
    trained = forward(BASE, MODEL, row_batch(prompt, text(7, 4)), adapter=adapter).route
    alone = forward(BASE, MODEL, row_batch(prompt, []), adapter=adapter, cache_length=12).route
    np.testing.assert_array_equal(trained.weights > 0, alone.weights > 0)
    np.testing.assert_allclose(trained.weights, alone.weights, atol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("path", ["gathered", "one_hot"])
def test_tenants_of_a_bank_each_get_their_own_tokens(path):
    adapters = {f"t{seed}": made(seed=10 * seed + 1, method="milora") for seed in range(3)}
    base = decode_layout(BASE)
    bank = Bank(BASE, MODEL, adapters["t0"], slots=3, path=path)
    for name, adapter in adapters.items():
        bank.load(name, adapter)
    settings = GenerationSettings(max_new_tokens=5, ignore_eos=True)
    prompt = [int(t) for t in text(8, 6)]
    engine = Engine(base, MODEL, bank.adapters, batch_slots=3, cache_length=32)
    asked = {name: engine.submit(prompt, settings, adapter_slot=bank.slot_of(name)) for name in adapters}
    engine.run()
    found = {name: request.tokens[0] for name, request in asked.items()}
    for name, adapter in adapters.items():
        alone = Engine(
            base,
            MODEL,
            AdapterStack.single(adapter_decode_layout(adapter, BASE)),
            batch_slots=1,
            cache_length=32,
        )
        request = alone.submit(prompt, settings)
        alone.run()
        assert found[name] == request.tokens[0]
    assert len(set(map(tuple, found.values()))) > 1


@pytest.mark.thorough
def test_merging_on_prefill_adds_the_change_to_every_expert():
    adapter = made(method="milora")
    route = forward(BASE, MODEL, BATCH, adapter=adapter).route
    weights = np.asarray(route.weights[:, 0, 0])
    merged = merged_base(decode_layout(BASE), adapter_decode_layout(adapter, BASE), weights)
    row = jax.tree.map(lambda leaf: leaf[:1], BATCH)
    found = forward(merged, MODEL, row).hidden
    np.testing.assert_allclose(found, run(adapter, row), atol=2e-4)


@pytest.mark.parametrize("method", REFUSED)
def test_a_method_that_reads_weights_or_outputs_is_refused_by_name(method):
    with pytest.raises(UserError, match=f"adapter.method is '{method}': expected one of milora, lora"):
        require_fits(build_method(AdapterSection(**{**small({"method": method}), "method": method})), MODEL)


@pytest.mark.thorough
def test_the_methods_that_experts_can_share():
    assert REFUSED == ["midora", "dora", "ia3"]
    adapter = made(method="ia3", change=False)
    with pytest.raises(ValueError, match="method 'ia3' cannot change a base with experts"):
        forward(BASE, MODEL, BATCH, adapter=adapter)


def test_peft_has_no_shared_pairs(tmp_path):
    write_hf_directory(tmp_path / "base", MODEL, tokenizer=False)
    message = "8 experts in a layer, which share the pairs of gate, up and down: PEFT has no such pairs"
    with pytest.raises(UserError, match=message):
        require_unfused(MODEL, tmp_path / "base")
    with pytest.raises(UserError, match=message):
        read_peft_adapter(tmp_path, tmp_path / "base")


@pytest.mark.thorough
@pytest.mark.parametrize("quantize", ["int8"])
def test_an_adapter_on_quantised_experts_learns(quantize, tmp_path):
    write_hf_directory(tmp_path, MODEL, tokenizer=False)
    base, _ = load_base(tmp_path, quantize=quantize)
    adapter = made(method="milora", base=base)

    def loss(params):
        return jnp.mean(run(adapter.replace(params=params), base=base) ** 2)

    grads = jax.tree.leaves(jax.grad(loss)(adapter.params).experts)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in grads)
    assert max(float(jnp.abs(leaf).max()) for leaf in grads) > 0
