"""The back ends of attention are one function; which one is taken depends on the platform alone."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.base import attention as dispatch
from milora_jax.base import ops, splash
from milora_jax.base.attention import Spread, attention, cudnn_serves
from milora_jax.base.blockwise import blockwise

ROWS, LENGTH, HEADS, KV_HEADS, WIDTH = 2, 200, 4, 2, 64
SEGMENTS = jnp.asarray([[1] * 90 + [2] * 70 + [0] * 40, [1] * 200], jnp.int32)
MASK = ops.attention_mask(SEGMENTS, SEGMENTS, 0)


def draw(dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = ((ROWS, LENGTH, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.fixture(scope="module")
def expected():
    return _with_slopes(lambda q, k, v: blockwise(q, k, v, MASK))


def _with_slopes(attend):
    def summed(q, k, v):
        out = attend(q, k, v)
        return (jnp.where(SEGMENTS[..., None, None] > 0, out, 0.0) ** 2).sum(), out

    (_, out), slopes = jax.jit(jax.value_and_grad(summed, argnums=(0, 1, 2), has_aux=True))(*draw())
    return jnp.where(SEGMENTS[..., None, None] > 0, out, 0.0), slopes


def test_splash_is_the_plain_form(expected):
    """In Pallas' interpreter: packed records, padding, grouped heads, a length that no block divides."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = _with_slopes(lambda q, k, v: splash.splash(q, k, v, SEGMENTS, interpret=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), found, expected)


def test_what_cudnn_is_asked_for_is_the_plain_form(expected):
    """The call, with XLA in cuDNN's place."""
    found = _with_slopes(
        lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=MASK[:, None], implementation="xla")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), found, expected)


def lowered(platform, spread, q, k, v, segments=SEGMENTS):
    traced = jax.jit(lambda *x: attention(*x, MASK, segments, spread)).trace(q, k, v)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_a_tpu_takes_the_kernel_where_it_serves():
    q, k, v = draw("bfloat16")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert "tpu_custom_call" in lowered("tpu", Spread(), q, k, v)
        assert "tpu_custom_call" not in lowered("tpu", None, q, k, v), "no spread was given"
        assert "tpu_custom_call" not in lowered("tpu", Spread(), q, k, v, None), "the mask says more"
        assert "tpu_custom_call" not in lowered("cpu", Spread(), q, k, v)
        narrow = [x[..., :32] for x in (q, k, v)]
        assert "tpu_custom_call" not in lowered("tpu", Spread(), *narrow)


@pytest.mark.parametrize(
    ("backend", "capability", "dtype", "width", "expected"),
    [
        ("gpu", "9.0", "bfloat16", 128, True),
        ("gpu", "8.0", "float16", 64, True),
        ("gpu", "7.5", "float16", 64, False),
        ("gpu", "9.0", "float32", 64, False),
        ("gpu", "9.0", "bfloat16", 256, False),
        ("cpu", "9.0", "bfloat16", 64, False),
    ],
)
def test_cudnn_is_asked_where_it_has_kernels(monkeypatch, backend, capability, dtype, width, expected):
    device = types.SimpleNamespace(compute_capability=capability)
    fake = types.SimpleNamespace(default_backend=lambda: backend, local_devices=lambda: [device])
    monkeypatch.setattr(dispatch, "jax", fake)
    assert cudnn_serves(jnp.zeros((1, 1, 1, width), dtype)) is expected
