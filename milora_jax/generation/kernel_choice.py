"""Which kernel multiplies many tenants' adapters on the device at hand: measured there, before it is needed.

A kernel that a device's compiler refuses, or whose result is wrong there, costs a line of the log. The plain
form, each row's matrices copied together, runs everywhere.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from milora_jax.adapters.joined import JoinedPairs
from milora_jax.errors import short
from milora_jax.generation.gpu_kernels import mosaic_serves
from milora_jax.generation.kernel import row_products
from milora_jax.generation.slot_pairs import SlotPairs, own_products, reference_products
from milora_jax.shapes import Array

PLAIN = "gathered"
CANDIDATES = {"tpu": ("tpu",), "gpu": ("mosaic", "triton")}
"""The kernels of a platform; the first of those that are about as fast is chosen."""

ABOUT = 1.1
"""Times within this ratio are about the same, so that two starts on one machine choose alike."""

SLOTS = ROWS = 8
"""Adapters and rows of the trial, each row with its own adapter."""

REPEATS = 7
TOLERANCE = 0.03
"""Largest difference from the plain products, over the largest of these; bfloat16 rounds to 0.004."""

Products = Callable[[Array, SlotPairs, Array, Array], Array]


def fastest_kernel(pairs: Sequence[JoinedPairs], platform: str, log: Callable[[str], None]) -> str:
    """Compile and time the kernels of a platform on pairs of one layer, beside the plain form.

    Args:
      pairs: those of each projection group of the layer, abstract; random ones are made like them.
      platform: a key of :data:`CANDIDATES`.
      log: receives a line about what was chosen, and one about each kernel that fails.

    Returns:
      The name of a kernel, or :data:`PLAIN`.
    """
    given = list(_inputs(pairs))
    expected = [jax.jit(reference_products)(*each) for each in given]
    seconds = {}
    for kernel in CANDIDATES[platform]:
        if kernel == "mosaic" and not all(map(mosaic_serves, (each[1] for each in given))):
            continue
        try:
            seconds[kernel] = _seconds(functools.partial(row_products, kernel=kernel), given, expected)
        except Exception as error:  # a compiler's or a driver's, of any kind
            log(f"kernel {kernel!r} for tenants' adapters is not used: {short(error)}")
    seconds[PLAIN] = _seconds(_own_products, [_gathered(*each) for each in given], expected)
    best = min(seconds.values())
    chosen = next(kernel for kernel, time_ in seconds.items() if time_ <= ABOUT * best)
    shown = ", ".join(f"{kernel} {1e6 * each:.0f} us a layer" for kernel, each in seconds.items())
    log(f"tenants' adapters: {chosen!r} ({shown})")
    return chosen


def _inputs(pairs: Sequence[JoinedPairs]) -> Iterator[tuple[Array, SlotPairs, Array, Array]]:
    """Random inputs of ``row_products``; each row chooses about half of the modules, as routes do."""
    rng = np.random.default_rng(0)
    for each in pairs:

        def draw(*shape: int, dtype: jnp.dtype = each.a.dtype) -> Array:
            return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-1]), dtype)

        (d_in, _), (tiles, rank, width), modules = each.a.shape, each.b.shape, len(each.tiles)
        slots = SlotPairs(draw(SLOTS, modules, rank, d_in), draw(SLOTS, tiles, rank, width), each.tiles)
        share = (np.arange(ROWS)[:, None] + np.arange(modules)) % 2
        yield draw(ROWS, d_in), slots, jnp.arange(ROWS, dtype=jnp.int32), jnp.asarray(share, jnp.float32)


def _gathered(x: Array, pairs: SlotPairs, slot: Array, share: Array) -> tuple[Array, SlotPairs, Array, Array]:
    """The inputs with the matrices of each row copied together, which decoding does once per request."""
    own = SlotPairs(pairs.a[slot], pairs.b[slot], pairs.tiles)
    return x, own, jnp.arange(len(slot), dtype=slot.dtype), share


def _own_products(x: Array, pairs: SlotPairs, slot: Array, share: Array) -> Array:
    """The products of rows whose matrices are copied already."""
    del slot
    return own_products(x, pairs, share)


def _seconds(
    products: Products, given: Sequence[tuple[Array, SlotPairs, Array, Array]], expected: Sequence[Array]
) -> float:
    """The median time of the products of all groups.

    Raises:
      ValueError: a result is wrong.
    """

    @jax.jit
    def layer(given: Sequence[tuple[Array, SlotPairs, Array, Array]]) -> list[Array]:
        return [products(*each) for each in given]

    for found, right in zip(layer(given), expected, strict=True):
        found, right = (np.asarray(each, np.float32) for each in (found, right))
        difference = float(np.abs(found - right).max() / np.abs(right).max())
        if not difference <= TOLERANCE:
            raise ValueError(f"its products differ from the plain ones by {difference:.3g} of the largest")
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        jax.block_until_ready(layer(given))
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
