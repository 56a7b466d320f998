"""The kernel for many tenants: Mosaic GPU's in Pallas' interpreter, and the choice by trial."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.adapters.joined import JoinedPairs
from milora_jax.generation import kernel_choice
from milora_jax.generation.gpu_kernels import mosaic_serves
from milora_jax.generation.kernel import row_products
from milora_jax.generation.kernel_choice import PLAIN, fastest_kernel
from milora_jax.generation.slot_pairs import SlotPairs, reference_products


@contextlib.contextmanager
def interpreted():
    """Mosaic GPU's interpreter, of which JAX has no public name yet."""
    params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    with params.force_gpu_interpret_mode():
        yield


@pytest.mark.parametrize(
    ("seed", "dtype", "tiles", "widths"),
    [
        (0, "float32", (1, 1, 1), (128, 256)),
        pytest.param(1, "float32", (4, 1, 1), (640, 128), marks=pytest.mark.thorough),
        pytest.param(2, "bfloat16", (1,), (1024, 384), marks=pytest.mark.thorough),
    ],
)
def test_mosaic_equals_its_reference_and_touches_nothing_that_no_row_chose(seed, dtype, tiles, widths):
    rng = np.random.default_rng(seed)
    rows, slots, rank, modules = 3, 4, 8, len(tiles)
    slot, share = (
        rng.integers(0, slots, rows),
        rng.random((rows, modules)) * (rng.random((rows, modules)) < 0.6),
    )
    share[0, 0] = 0.5
    share[1, 0] = 0.0
    a = np.full((slots, modules, rank, widths[0]), np.nan, np.float32)
    b = np.full((slots, sum(tiles), rank, widths[1]), np.nan, np.float32)
    of_tile = [m for m, count in enumerate(tiles) for _ in range(count)]
    for row in range(rows):
        for module in np.flatnonzero(share[row]):
            a[slot[row], module] = rng.normal(size=a.shape[2:])
            for tile in [t for t, m in enumerate(of_tile) if m == module]:
                b[slot[row], tile] = rng.normal(size=b.shape[2:])
    pairs = SlotPairs(jnp.asarray(a, dtype), jnp.asarray(b, dtype), tiles)
    assert mosaic_serves(pairs)
    x = jnp.asarray(rng.normal(size=(rows, widths[0])), dtype)
    given = jnp.asarray(slot, jnp.int32), jnp.asarray(share, jnp.float32)
    with interpreted():
        found = np.asarray(row_products(x, pairs, *given, "mosaic"), np.float32)
    whole = SlotPairs(jnp.nan_to_num(pairs.a), jnp.nan_to_num(pairs.b), tiles)
    expected = np.asarray(reference_products(x, whole, *given), np.float32)
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize(
    ("d_in", "width", "served"), [(128, 4096, True), (576, 128, False), (128, 192, False)]
)
def test_mosaic_serves_what_its_threads_can_divide(d_in, width, served):
    shapes = (jax.ShapeDtypeStruct((2, 1, 8, n), jnp.float32) for n in (d_in, width))
    assert mosaic_serves(SlotPairs(*shapes, (1,))) == served


def a_layer():
    def of(d_in, width, tiles):
        shapes = ((d_in, 8 * len(tiles)), (sum(tiles), 8, width))
        return JoinedPairs(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes), tiles)

    return [of(64, 32, (2, 1, 1)), of(64, 64, (1,)), of(64, 96, (1, 1)), of(96, 64, (1,))]


@pytest.fixture
def chosen(monkeypatch):
    """The choice among some kernels, with times and faults put in, and what it logs."""

    def choose(times, faults=()):
        said, seconds = [], kernel_choice._seconds

        def measured(products, given, expected):
            seconds(products, given, expected)
            return times[getattr(products, "keywords", {}).get("kernel", PLAIN)]

        def broken(x, pairs, slot, share, kernel):
            if faults.get(kernel) == "raises":
                raise RuntimeError("no such instruction\nand a stack")
            wrong = 2.0 if faults.get(kernel) == "wrong" else 1.0
            return wrong * row_products(x, pairs, slot, share, kernel)

        faults = dict(faults)
        kernels = tuple(name for name in times if name != PLAIN)
        monkeypatch.setitem(kernel_choice.CANDIDATES, "gpu", kernels)
        monkeypatch.setattr(kernel_choice, "_seconds", measured)
        monkeypatch.setattr(kernel_choice, "row_products", broken)
        return fastest_kernel(a_layer(), "gpu", said.append), said

    return choose


TPU, TRITON = "tpu interpreted", "triton interpreted"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({TRITON: 1.0, TPU: 2.0, PLAIN: 3.0}, TRITON),
        ({TRITON: 3.0, TPU: 2.0, PLAIN: 1.0}, PLAIN),
        ({TRITON: 1.05, TPU: 1.0, PLAIN: 1.0}, TRITON),
    ],
    ids=["fastest", "plain", "about as fast"],
)
def test_the_fastest_is_chosen_and_named(chosen, times, expected):
    found, said = chosen(times)
    assert found == expected
    (line,) = said
    assert line.startswith(f"tenants' adapters: {expected!r} (")
    assert all(f"{name} {1e6 * each:.0f} us" in line for name, each in times.items())


def test_a_kernel_that_fails_or_is_wrong_costs_a_line(chosen):
    found, said = chosen({TRITON: 1.0, TPU: 1.0, PLAIN: 3.0}, {TRITON: "raises", TPU: "wrong"})
    assert found == PLAIN
    assert said[0] == (
        f"kernel {TRITON!r} for tenants' adapters is not used: RuntimeError: no such instruction"
    )
    assert said[1].startswith(
        f"kernel {TPU!r} for tenants' adapters is not used: ValueError: its products differ"
    )
    assert len(said) == 3
