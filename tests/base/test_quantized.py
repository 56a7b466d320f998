"""Kernels in 8 and 4 bits: what the codes say, that products are right and never write a whole kernel."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax import load_base, logits
from milora_jax.adapters.protocol import init_adapter
from milora_jax.adapters.registry import adapter_shape, build_method
from milora_jax.base import quantized
from milora_jax.base.hf import load_leaves
from milora_jax.base.modules import decode_layout, frozen_kernels
from milora_jax.base.quantized import NF4_VALUES, SCHEMES, bits_of, decode
from milora_jax.config import AdapterSection, MeshSection
from milora_jax.errors import UserError
from milora_jax.parallel.mesh import make_mesh
from milora_jax.parallel.rules import base_sharding
from tests.models import QUANTIZABLE, decoded_base, quantized_base, random_base, write_hf_directory
from tests.programs import compiled, largest_floats

CODED = sorted(SCHEMES)
F32 = jnp.dtype("float32")


def draw(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def encoded(values, name):
    scheme, values = SCHEMES[name], np.asarray(values)
    scales = scheme.scales_of(values)
    return jnp.asarray(scheme.codes_of(values, scales)), jnp.asarray(scales)


def test_int8_is_half_a_step_away_at_most():
    values = draw(96, 40)
    codes, scales = encoded(values, "int8")
    assert (codes.dtype, codes.shape, scales.shape) == (jnp.int8, (96, 40), (1, 40))
    assert int(abs(codes).max()) == 127
    error = abs(decode(codes, scales, F32) - values)
    assert (np.asarray(error) <= np.asarray(scales) * 0.5001).all()


def test_nf4_takes_the_nearest_of_its_values():
    values = np.asarray(draw(128, 12))
    codes, scales = encoded(values, "nf4")
    assert (codes.dtype, codes.shape, scales.shape) == (jnp.uint4, (128, 12), (2, 12))
    by_block = values.reshape(2, 64, 12)
    largest = abs(by_block).max(axis=1).astype(scales.dtype).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(scales, np.float32), largest)
    choices = np.multiply.outer(largest, np.array(NF4_VALUES, np.float32))[:, None]
    distance = abs(by_block[..., None] - choices)
    found = np.asarray(decode(codes, scales, F32)).reshape(by_block.shape)
    np.testing.assert_allclose(abs(by_block - found), distance.min(axis=-1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", CODED)
def test_zeros_and_single_values_survive(name):
    values = np.zeros((64, 3), np.float32)
    values[5, 1] = -0.75
    np.testing.assert_array_equal(decode(*encoded(values, name), F32), values)


def test_every_code_is_decoded():
    codes = jnp.arange(16, dtype=jnp.uint4).reshape(16, 1)
    found = decode(codes, jnp.full((1, 1), 2.0, jnp.bfloat16), F32)
    np.testing.assert_array_equal(found[:, 0], 2 * np.array(NF4_VALUES, np.float32))


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("tile_bytes", [None, 4 * 192 * 128])
def test_a_product_is_that_of_the_decoded_kernel(monkeypatch, name, tile_bytes):
    """Also where the last tile overlaps the one before: 200 columns, and rows of 192."""
    if tile_bytes:
        monkeypatch.setattr(quantized, "TILE_BYTES", tile_bytes)
    codes, scales = encoded(draw(192, 200), name)
    x, slope = draw(2, 3, 192, seed=1), draw(2, 3, 200, seed=2)
    kernel = decode(codes, scales, F32)
    found, back = jax.vjp(lambda x: quantized.product(x, codes, scales), x)
    np.testing.assert_allclose(found, x @ kernel, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(back(slope)[0], slope @ kernel.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", CODED)
def test_the_forms_of_a_product_agree(name):
    codes, scales = encoded(draw(256, 384), name)
    for x, whole, tiled in (
        (draw(7, 256), quantized._forward_whole, quantized._forward_tiled),
        (draw(7, 384), quantized._backward_whole, quantized._backward_tiled),
    ):
        np.testing.assert_allclose(
            tiled(x, codes, scales, 4 * 256 * 128), whole(x, codes, scales), rtol=1e-5, atol=1e-4
        )


@pytest.mark.parametrize("name", CODED)
def test_a_product_in_bfloat16(name):
    codes, scales = encoded(draw(128, 64), name)
    x = draw(5, 128, dtype="bfloat16")
    found = quantized.product(x, codes, scales)
    assert found.dtype == jnp.bfloat16
    expected = np.asarray(x, np.float32) @ np.asarray(decode(codes, scales, F32))
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=0.03, atol=0.2)


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("size", [1e-2, 1e-5])
def test_small_slopes_survive_float16(name, size):
    """Times a scale of 1e-4 they would be below its smallest number."""
    codes, scales = encoded(0.02 * draw(256, 256), name)
    slope = size * draw(8, 256, seed=2)
    kernel = np.asarray(decode(codes, scales, F32))
    _, back = jax.vjp(lambda x: quantized.product(x, codes, scales), jnp.zeros((8, 256), jnp.float16))
    found = np.asarray(back(slope.astype(jnp.float16))[0], np.float32)
    expected = np.asarray(slope) @ kernel.T
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


def test_looking_at_the_kernels_does_not_decode_them_all():
    """DoRA starts from the norms of all layers' columns. (Those of NF4 XLA for CPUs does decode first.)"""
    base = quantized_base(dataclasses.replace(QUANTIZABLE, num_layers=8), "int8")
    method = build_method(AdapterSection(method="dora", rank=4))

    def fresh(base):
        return init_adapter(
            method, jax.random.key(0), adapter_shape(QUANTIZABLE), frozen_kernels(base)
        ).params

    program = compiled(jax.jit(fresh).lower(base))
    assert program.memory_analysis().temp_size_in_bytes < 4 * 8 * 128 * 192 / 2


@pytest.mark.parametrize("name", CODED)
def test_no_full_size_copy_is_written(name):
    """Nothing of a compiled product, forward and backward, is as large as the decoded kernel."""
    d_in, d_out = 1024, 3072
    codes, scales = encoded(np.zeros((d_in, d_out), np.float32), name)

    def both(x, slope, codes, scales):
        y, back = jax.vjp(lambda x: quantized.product(x, codes, scales), x)
        return y, back(slope)

    def plainly(x, slope, codes, scales):
        y, back = jax.vjp(lambda x: x @ decode(codes, scales, x.dtype), x)
        return y, back(slope)

    given = (draw(4, d_in), draw(4, d_out), codes, scales)
    program, plain = (compiled(jax.jit(f).lower(*given)) for f in (both, plainly))
    assert largest_floats(program) < d_in * d_out
    assert program.memory_analysis().temp_size_in_bytes < 4 * d_in * d_out
    assert largest_floats(plain) == d_in * d_out, "the search would not see a copy"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_hf_directory(folder, QUANTIZABLE, tokenizer=False)
    return folder


@pytest.mark.thorough
@pytest.mark.parametrize("name", CODED)
def test_a_loaded_base_is_the_plain_one_encoded(folder, name):
    base, config = load_base(folder, quantize=name)
    plain = random_base(QUANTIZABLE)
    assert config == QUANTIZABLE
    for module in ("q", "down"):
        kernels = np.asarray(getattr(plain.layers, module).kernel[...])
        found = getattr(base.layers, module)
        for i, kernel in enumerate(kernels):
            codes, scales = encoded(kernel, name)
            np.testing.assert_array_equal(found.kernel[...][i], codes)
            np.testing.assert_array_equal(found.scales[...][i], scales)
    np.testing.assert_array_equal(base.embedding[...], plain.embedding[...])
    np.testing.assert_array_equal(base.head[...], plain.head[...])
    bits = {"int8": 8, "nf4": 4}[name]
    assert bits_of(base.layers.o.kernel[...].dtype) == bits
    joined, _ = load_base(folder, quantize=name, decode=True)
    jax.tree.map(np.testing.assert_array_equal, joined, decode_layout(base))


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 4}])
def test_a_split_quantised_base_is_the_whole_one(folder, name, sizes):
    """Shards of 16 rows cut blocks of 64."""
    mesh = make_mesh(MeshSection(**{"data": 1, **sizes}))
    split = load_leaves(folder, QUANTIZABLE, "float32", lambda path: base_sharding(mesh, path), quantize=name)
    whole, _ = load_base(folder, quantize=name)
    jax.tree.map(np.testing.assert_array_equal, split, whole)
    shard = split.layers.q.kernel[...].addressable_shards[0].data
    assert shard.shape[1:] == (128 // sizes["fsdp"], 128 // sizes.get("tensor", 1))


@pytest.mark.thorough
@pytest.mark.parametrize("name", CODED)
def test_logits_are_those_of_the_decoded_kernels(folder, name):
    base, config = load_base(folder, quantize=name)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (2, 11)), jnp.int32)
    found = logits(base, config, tokens)
    np.testing.assert_allclose(found, logits(decoded_base(base), config, tokens), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found, logits(decode_layout(base), config, tokens), rtol=1e-4, atol=1e-4)
    plain = logits(random_base(QUANTIZABLE), config, tokens)
    change = float(jnp.linalg.norm(found - plain) / jnp.linalg.norm(plain))
    assert 1e-4 < change < {"int8": 0.06, "nf4": 0.6}[name]


def test_what_cannot_be_quantised_is_one_line(tmp_path):
    narrow = dataclasses.replace(QUANTIZABLE, hidden_size=96)
    write_hf_directory(tmp_path / "narrow", narrow, tokenizer=False)
    with pytest.raises(UserError, match=r"input width of model.layers.0.self_attn.q_proj.weight is 96"):
        load_base(tmp_path / "narrow", quantize="nf4")
    load_base(tmp_path / "narrow", quantize="int8")
    with pytest.raises(UserError, match="quantize is 'int4': expected one of none, int8, nf4"):
        load_base(tmp_path / "narrow", quantize="int4")
    broken = random_base(QUANTIZABLE)
    broken.layers.up.kernel[...] = broken.layers.up.kernel[...].at[1, 2, 3].set(jnp.nan)
    write_hf_directory(tmp_path / "broken", QUANTIZABLE, tokenizer=False, base=broken)
    with pytest.raises(UserError, match=r"tensor 'model.layers.1.mlp.up_proj.weight' has a value that"):
        load_base(tmp_path / "broken", quantize="int8")
