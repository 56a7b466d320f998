"""The feed-forward layer of a base with experts, against sums over single tokens and experts."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from milora_jax.base.experts import _TRANSPOSED, Blocks, _product, block_size, through_experts
from milora_jax.base.load import load_base, logits
from milora_jax.base.modules import Experts, Linear, decode_layout
from milora_jax.base.quantized import SCHEMES
from milora_jax.errors import UserError
from tests.families import EXPERT_CONFIGS
from tests.models import QUANTIZABLE, TINY, write_hf_directory

X, C = 6, 2


def experts_of(count=X, width=32, inner=48, seed=0):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape).astype(np.float32) * 0.3)

    into = Linear(draw(count, width, inner), None), Linear(draw(count, width, inner), None)
    return Experts(draw(width, count), into, Linear(draw(count, inner, width), None))


def config_of(normed=True, count=X, chosen=C):
    return dataclasses.replace(
        TINY, num_experts=count, experts_per_token=chosen, norm_topk_prob=normed, family="olmoe"
    )


def token_by_token(config, experts, x, changes=None):
    """The layer in float64, one token and one expert at a time; and the mixed hidden states."""
    gate, up, down = (np.float64(linear.kernel[...]) for linear in (*experts.into, experts.down))
    router = np.float64(experts.router[...])
    output, hidden = np.zeros(x.shape), np.zeros((*x.shape[:2], gate.shape[-1]))
    for place in np.ndindex(*x.shape[:2]):
        row = np.float64(x[place])
        scores = row @ router
        probs = np.exp(scores - scores.max())
        probs /= probs.sum()
        best = np.argsort(-probs)[: config.experts_per_token]
        share = probs[best].sum() if config.norm_topk_prob else 1.0
        for number in best:
            g, u = row @ gate[number], row @ up[number]
            if changes is not None:
                g, u = (p + np.float64(change[place]) for p, change in zip((g, u), changes, strict=True))
            h = g / (1 + np.exp(-g)) * u
            hidden[place] += probs[number] / share * h
            output[place] += probs[number] / share * (h @ down[number])
    return output, hidden


@pytest.mark.thorough
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (3, 1), (2, 17), (4, 64)])
def test_the_layer_is_the_sum_over_chosen_experts(rows, length, normed):
    config, experts = config_of(normed), experts_of()
    rng = np.random.default_rng(1)
    x = rng.normal(size=(rows, length, 32)).astype(np.float32)
    changes = tuple(rng.normal(size=(rows, length, 48)).astype(np.float32) for _ in range(2))
    for given in (None, changes):
        expected = token_by_token(config, experts, x, given)
        for form in (experts, experts.joined()):
            found = jax.jit(through_experts, static_argnums=0)(config, form, jnp.asarray(x), given)
            for mine, theirs in zip(found, expected, strict=True):
                np.testing.assert_allclose(mine, theirs, atol=2e-5)


@pytest.mark.thorough
def test_one_expert_for_all_and_all_experts_for_one():
    """Blocks of the extreme cases: every row in one expert, and every expert for every row."""
    x = np.random.default_rng(2).normal(size=(2, 9, 32)).astype(np.float32)
    experts = experts_of()
    experts.router[...] = jnp.zeros_like(experts.router[...]).at[:, 3].set(jnp.asarray(x.mean((0, 1)) * 0))
    one = config_of(chosen=1)
    same = token_by_token(one, experts, x)  # all scores are equal: the first expert has them all
    np.testing.assert_allclose(through_experts(one, experts, jnp.asarray(x))[0], same[0], atol=2e-5)
    everyone, experts = config_of(chosen=X), experts_of()
    expected = token_by_token(everyone, experts, x)
    np.testing.assert_allclose(through_experts(everyone, experts, jnp.asarray(x))[0], expected[0], atol=2e-5)


def dense(config, experts, x, changes):
    """Every expert on every token, for gradients by JAX alone."""
    probs = jax.nn.softmax(x @ experts.router[...], axis=-1)
    best = jax.lax.top_k(probs, config.experts_per_token)[1]
    mask = jax.nn.one_hot(best, config.num_experts).sum(-2)
    weights = probs * mask
    weights = weights / weights.sum(-1, keepdims=True)
    gate, up = (jnp.einsum("BTD,XDF->BTXF", x, linear.kernel[...]) for linear in experts.into)
    gate, up = (p + change[:, :, None] for p, change in zip((gate, up), changes, strict=True))
    hidden = jax.nn.silu(gate) * up
    output = jnp.einsum("BTXF,XFD->BTXD", hidden, experts.down.kernel[...])
    return tuple(jnp.einsum("BTXF,BTX->BTF", values, weights) for values in (output, hidden))


@pytest.mark.thorough
@pytest.mark.parametrize("length", [1, 40])
def test_the_gradient_of_stream_and_changes_is_that_of_the_dense_sum(length):
    config, experts = config_of(), experts_of()
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(2, length, 32)).astype(np.float32))
    changes = tuple(jnp.asarray(rng.normal(size=(2, length, 48)).astype(np.float32)) for _ in range(2))

    def loss(run, x, changes):
        output, hidden = run(config, experts, x, changes)
        return jnp.sum(jnp.sin(output)) + jnp.sum(jnp.cos(hidden))

    found = jax.grad(lambda *given: loss(through_experts, *given), argnums=(0, 1))(x, changes)
    expected = jax.grad(lambda *given: loss(dense, *given), argnums=(0, 1))(x, changes)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert float(jnp.abs(theirs).max()) > 0.1
        np.testing.assert_allclose(mine, theirs, atol=5e-5)


@pytest.mark.thorough
@pytest.mark.parametrize(("rows", "chosen", "count"), [(1, 2, 8), (5, 3, 4), (50, 2, 7), (300, 4, 3)])
def test_blocks_hold_every_copy_once_and_suit_ragged_dot(rows, chosen, count):
    """``ragged_dot``, which accelerators use, reads the same places with the same sizes."""
    rng = np.random.default_rng(4)
    ids = np.stack([rng.permutation(count + 1)[:chosen] for _ in range(rows)])  # count: without an expert
    values = jnp.asarray(rng.normal(size=(rows, 5)).astype(np.float32))
    kernel = jnp.asarray(rng.normal(size=(count, 5, 3)).astype(np.float32))
    blocks = Blocks.of(jnp.asarray(ids), count)
    assert blocks.copy.shape[0] == blocks.expert.shape[0] * blocks.size
    held = np.asarray(blocks.copy)
    assert sorted(held[held < rows * chosen]) == sorted(np.flatnonzero(ids.reshape(-1) < count))
    spread = blocks.spread(values)
    products = _product(spread, Linear(kernel, None), blocks)
    found = np.asarray(blocks.collect(products))
    padded = np.concatenate([np.asarray(kernel), np.zeros((1, 5, 3), np.float32)])
    expected = np.einsum("md,mcdf->mcf", np.asarray(values), padded[ids])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    ragged = jax.lax.ragged_dot(spread, kernel, blocks.sizes)
    np.testing.assert_allclose(blocks.collect(ragged), expected, atol=1e-5)
    back = jax.lax.ragged_dot_general(products, kernel, blocks.sizes, _TRANSPOSED)
    expected = np.einsum("mcf,mcdf->mcd", expected, padded[ids])
    np.testing.assert_allclose(blocks.collect(back), expected, atol=1e-4)


def test_a_block_is_no_larger_than_its_rows_need():
    assert [block_size(copies, 16) for copies in (1, 8, 16, 200, 10**6)] == [1, 1, 2, 32, 64]


QUANTIZABLE_EXPERTS = dataclasses.replace(
    QUANTIZABLE,
    num_layers=2,
    num_experts=4,
    experts_per_token=2,
    norm_topk_prob=True,
    qk_norm=True,
    family="qwen3_moe",
)


@pytest.mark.thorough
@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_quantised_experts_compute_with_their_decoded_values(quantize, tmp_path):
    write_hf_directory(tmp_path, QUANTIZABLE_EXPERTS, tokenizer=False)
    base, config = load_base(tmp_path, quantize=quantize)
    plain, _ = load_base(tmp_path)
    kernels, scheme = np.asarray(plain.layers.experts.up.kernel[...]), SCHEMES[quantize]
    module = base.layers.experts.up
    for place in [(0, 0), (1, 3)]:
        scales = scheme.scales_of(kernels[place])
        np.testing.assert_array_equal(module.scales[...][place], scales)
        np.testing.assert_array_equal(module.kernel[...][place], scheme.codes_of(kernels[place], scales))
    decoded = jax.tree.map(lambda leaf: leaf, base)
    for layer in (decoded.layers, decoded.layers.experts):
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            found = getattr(layer, name, None)
            if found is not None:
                setattr(layer, name, Linear(found.dense(base.dtype), None))
    tokens = jnp.asarray(np.random.default_rng(5).integers(0, config.vocab_size, (2, 20)))
    expected = np.asarray(logits(decoded, config, tokens))
    np.testing.assert_allclose(logits(base, config, tokens), expected, atol=2e-3)
    assert np.abs(np.asarray(logits(plain, config, tokens)) - expected).max() > 1e-2
    layer = jax.tree.map(lambda leaf: leaf[1], base.layers.experts)
    values = jax.tree.map(lambda leaf: leaf[1], decoded.layers.experts)
    x = jnp.asarray(np.random.default_rng(6).normal(size=(2, 5, 128)).astype(np.float32))
    slopes = [
        jax.grad(lambda x, each=each: jnp.sin(through_experts(config, each, x)[0]).sum())(x)
        for each in (layer, values)
    ]
    np.testing.assert_allclose(*slopes, atol=2e-3 * float(jnp.abs(slopes[1]).max()))


def test_the_layout_for_decoding_is_loaded_as_it_is_made(tmp_path):
    write_hf_directory(tmp_path, EXPERT_CONFIGS["mixtral"], tokenizer=False)
    made = decode_layout(load_base(tmp_path)[0])
    loaded, _ = load_base(tmp_path, decode=True)
    assert made.layers[0].experts.gate_up is not None
    jax.tree.map(np.testing.assert_array_equal, loaded, made)


DAMAGES = {
    "model.layers.1.mlp.experts.4.up_proj.weight": (
        lambda tensors, name: tensors.pop(name),
        "tensor 'model.layers.1.mlp.experts.4.up_proj.weight' is missing (1 in all)",
    ),
    "model.layers.0.mlp.gate.weight": (
        lambda tensors, name: tensors.update({name: tensors[name][:-1]}),
        "tensor 'model.layers.0.mlp.gate.weight' has shape (7, 32), expected (8, 32)",
    ),
    "model.layers.0.mlp.experts.8.up_proj.weight": (
        lambda tensors, name: tensors.update({name: tensors["model.layers.0.mlp.experts.7.up_proj.weight"]}),
        "unexpected tensor 'model.layers.0.mlp.experts.8.up_proj.weight'",
    ),
    "model.layers.0.mlp.experts.2.down_proj.weight": (
        lambda tensors, name: tensors.update({name: np.ascontiguousarray(tensors[name].T)}),
        "experts.2.down_proj.weight' has shape (48, 32), expected (32, 48)",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_refused_by_the_tensors_name(name, tmp_path):
    write_hf_directory(tmp_path, EXPERT_CONFIGS["qwen3_moe"], tokenizer=False)
    damage, message = DAMAGES[name]
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    damage(tensors, name)
    save_file(tensors, path)
    with pytest.raises(UserError) as caught:
        load_base(tmp_path)
    assert message in str(caught.value)


def test_a_config_for_more_experts_than_the_file_has_is_refused(tmp_path):
    write_hf_directory(tmp_path, EXPERT_CONFIGS["olmoe"], tokenizer=False)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_experts": 9}))
    with pytest.raises(UserError, match=r"tensor 'model.layers.0.mlp.experts.6.down_proj.weight' is missing"):
        load_base(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": -1}, "num_experts is -1"),
        ({"experts_per_token": 7}, "experts_per_token is 7: expected 1 to num_experts 6"),
        ({"experts_per_token": 0}, "experts_per_token is 0: expected 1 to num_experts 6"),
        ({"biased": ("gate", "up")}, "no bias in the experts"),
    ],
)
def test_a_shape_of_experts_that_cannot_be_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(config_of(), **changes)
