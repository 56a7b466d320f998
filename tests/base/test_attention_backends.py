"""The back ends of attention are one function; which one is taken depends on the platform alone."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.base import attention as dispatch
from milora_jax.base import ops, splash
from milora_jax.base.attention import (
    DeviceLayout,
    attention,
    compiles,
    cudnn_serves,
    device_layout,
    has_cudnn,
)
from milora_jax.base.blockwise import blockwise
from milora_jax.base.ops import Scoring, Window

ROWS, LENGTH, HEADS, KV_HEADS, WIDTH = 2, 200, 4, 2, 64
SEGMENTS = jnp.asarray([[1] * 90 + [2] * 70 + [0] * 40, [1] * 200], jnp.int32)
MASK = ops.attention_mask(SEGMENTS, SEGMENTS, 0)


def draw(dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = ((ROWS, LENGTH, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


PLACES = jnp.broadcast_to(jnp.arange(LENGTH)[None], (ROWS, LENGTH))
CASES = {
    "whole": (None, Scoring(WIDTH**-0.5, None)),
    "window": (Window(PLACES, PLACES, 30), Scoring(0.2, None)),
    "capped": (Window(PLACES, PLACES, 30), Scoring(0.2, 2.0)),
}
"""A window by slots is one by positions: a record's tokens lie next to each other."""


@pytest.fixture(scope="module", params=CASES)
def case(request):
    window, scoring = CASES[request.param]
    return window, scoring, _with_slopes(lambda q, k, v: blockwise(q, k, v, MASK, window, scoring))


def _with_slopes(attend):
    def summed(q, k, v):
        out = attend(q, k, v)
        return (jnp.where(SEGMENTS[..., None, None] > 0, out, 0.0) ** 2).sum(), out

    (_, out), slopes = jax.jit(jax.value_and_grad(summed, argnums=(0, 1, 2), has_aux=True))(*draw())
    return jnp.where(SEGMENTS[..., None, None] > 0, out, 0.0), slopes


@pytest.mark.thorough
def test_splash_is_the_plain_form(case):
    """In Pallas' interpreter: packed records, padding, grouped heads, a length that no block divides."""
    window, scoring, expected = case
    size = None if window is None else window.size
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = _with_slopes(lambda q, k, v: splash.splash(q, k, v, SEGMENTS, size, scoring, interpret=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), found, expected)


@pytest.mark.thorough
def test_what_cudnn_is_asked_for_is_the_plain_form(monkeypatch, case):
    """The call that is made, with XLA in cuDNN's place; of a cap it knows nothing, and is not asked."""
    window, scoring, expected = case
    asked, attend = [], jax.nn.dot_product_attention

    def stand_in(*given, implementation, **more):
        asked.append(implementation)
        return attend(*given, **more, implementation="xla")

    monkeypatch.setattr(dispatch, "cudnn_serves", lambda q, k: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    found = _with_slopes(
        lambda q, k, v: attention(q, k, v, MASK, scoring, SEGMENTS, window, DeviceLayout(cudnn=True))
    )
    assert asked == ([] if scoring.cap else ["cudnn"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), found, expected)


def lowered(platform, layout, q, k, v, segments=SEGMENTS, window=None):
    scoring = CASES["whole"][1]
    traced = jax.jit(lambda *x: attention(*x, MASK, scoring, segments, window, layout)).trace(q, k, v)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.thorough
def test_a_tpu_takes_the_kernel_where_it_serves():
    q, k, v = draw("bfloat16")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert "tpu_custom_call" in lowered("tpu", DeviceLayout(), q, k, v)
        assert "tpu_custom_call" not in lowered("tpu", None, q, k, v), "no layout was given"
        assert "tpu_custom_call" not in lowered("tpu", DeviceLayout(), q, k, v, None), "the mask says more"
        assert "tpu_custom_call" not in lowered("cpu", DeviceLayout(), q, k, v)
        assert "tpu_custom_call" in lowered("tpu", DeviceLayout(), q, k, v, window=Window(PLACES, PLACES, 30))
        of_this_layer = Window(PLACES, PLACES, jnp.int32(30))
        assert "tpu_custom_call" not in lowered("tpu", DeviceLayout(), q, k, v, window=of_this_layer)
        narrow = [x[..., :32] for x in (q, k, v)]
        assert "tpu_custom_call" not in lowered("tpu", DeviceLayout(), *narrow)
        half = draw("float16")
        assert "tpu_custom_call" not in lowered("tpu", DeviceLayout(), *half), "its compiler would refuse"


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("gpu", "9.0", True),
        ("gpu", "8.0", True),
        ("gpu", "7.5", False),
        ("gpu", "gfx90a", False),
        ("cpu", "9.0", False),
    ],
)
def test_which_devices_have_cudnn(platform, capability, expected, monkeypatch):
    monkeypatch.setattr(dispatch, "compiles", lambda *given: True)
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    assert has_cudnn(device) is expected
    assert not has_cudnn(types.SimpleNamespace(platform=platform))


def test_a_kernel_that_a_device_cannot_compile_is_a_warning_and_the_plain_form(monkeypatch):
    device = jax.devices()[0]
    with pytest.warns(RuntimeWarning, match=r"cuDNN's attention is not used on .*: \w+"):
        assert not compiles(device, "cuDNN's attention", dispatch._cudnn), "a CPU has none"
    assert not compiles(device, "cuDNN's attention", dispatch._cudnn), "and that is said once"
    assert compiles(device, "plain attention", lambda q, k, v, segments: q + k + v)
    with monkeypatch.context() as several:
        several.setattr(jax, "process_count", lambda: 2)
        assert compiles.__wrapped__(device, "cuDNN's attention", dispatch._cudnn), "all run one program"
    tpu = types.SimpleNamespace(platform="tpu")
    monkeypatch.setattr(dispatch, "compiles", lambda *given: False)
    layout = device_layout([tpu])
    assert not layout.splash
    q, k, v = (x[..., :64] for x in draw())
    assert "tpu_custom_call" in lowered("tpu", DeviceLayout(), q, k, v)
    assert "tpu_custom_call" not in lowered("tpu", layout, q, k, v)
    assert device_layout([device]).splash, "where there is no TPU nothing is tried"


@pytest.mark.parametrize(
    ("dtype", "queries", "keys", "width", "expected"),
    [
        ("bfloat16", 64, 64, 128, True),
        ("float16", 64, 64, 64, True),
        ("float32", 64, 64, 64, False),
        ("bfloat16", 64, 64, 256, False),
        ("bfloat16", 64, 67, 64, False),
        ("bfloat16", 63, 63, 64, False),
    ],
)
def test_what_cudnn_takes(dtype, queries, keys, width, expected):
    q, k = (jnp.zeros((1, length, 1, width), dtype) for length in (queries, keys))
    assert cudnn_serves(q, k) is expected
