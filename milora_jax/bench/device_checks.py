"""Whether the kernels of a device compute what plain products compute: the first row of ``bench device``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from milora_jax.base import quantized
from milora_jax.base.attention import attention, device_layout
from milora_jax.base.ops import Scoring
from milora_jax.errors import short
from milora_jax.generation.kernel import row_products
from milora_jax.generation.kernel_choice import CANDIDATES
from milora_jax.generation.slot_pairs import SlotPairs, reference_products
from milora_jax.shapes import Array

TOLERANCE = {"float32": 5e-3, "bfloat16": 3e-2}
"""Largest difference, as a share of the reference's largest value; GPUs multiply float32 in TF32."""

Check = tuple[str, str, Callable[[], tuple[Array, Array]]]
"""A name, a dtype, and what gives the kernel's result and the reference's."""


def check_all() -> dict[str, Any]:
    """Compare every kernel with its reference; one that does not compile is an error of its own.

    Returns:
      ``ok``, and for each check its difference, or the error.
    """
    found = [_outcome(*check) for check in _checks(jax.default_backend())]
    return {"ok": all(each["ok"] for each in found), "checks": found}


def _outcome(name: str, dtype: str, both: Callable[[], tuple[Array, Array]]) -> dict[str, Any]:
    try:
        result, reference = (np.asarray(each, np.float64) for each in both())
    except Exception as error:  # a compiler's: the other kernels are still of interest
        return {"check": name, "ok": False, "error": short(error)}
    difference = float(np.abs(result - reference).max() / np.abs(reference).max())
    return {"check": name, "ok": difference <= TOLERANCE[dtype], "difference": difference}


def _checks(backend: str) -> Iterator[Check]:
    small = backend == "cpu"
    for dtype in ("float32", "bfloat16"):
        kernels = ("tpu interpreted", "triton interpreted") if small else CANDIDATES[backend]
        for kernel in kernels:
            yield f"row_products, {kernel}, {dtype}", dtype, _tenants(kernel, dtype, small)
        yield f"attention, {dtype}", dtype, _attention(dtype, small, gradient=False)
        yield f"gradient of attention, {dtype}", dtype, _attention(dtype, small, gradient=True)
        for kept in quantized.SCHEMES:
            for rows in (1, 512):
                yield f"{kept} product of {rows} rows, {dtype}", dtype, _product(kept, rows, dtype, small)


def _tenants(kernel: str, dtype: str, small: bool) -> Callable[[], tuple[Array, Array]]:
    """Of 16 tenants with rank 32 on q, k and v; a row chooses some of them."""

    def both() -> tuple[Array, Array]:
        rng, width, slots, rows = np.random.default_rng(0), 64 if small else 4096, 16, 32

        def draw(*shape: int) -> Array:
            return jnp.asarray(rng.normal(size=shape), dtype)

        pairs = SlotPairs(draw(slots, 3, 32, width), draw(slots, 3, 32, width), (1, 1, 1))
        slot = jnp.asarray(rng.integers(0, slots, rows), jnp.int32)
        share = jnp.asarray(rng.random((rows, 3)) * (rng.random((rows, 3)) < 0.5), jnp.float32)
        given = draw(rows, width), pairs, slot, share
        with jax.default_matmul_precision("highest"):
            reference = jax.jit(reference_products)(*given)
        return jax.jit(row_products, static_argnums=4)(*given, kernel), reference

    return both


def _attention(dtype: str, small: bool, *, gradient: bool) -> Callable[[], tuple[Array, Array]]:
    """Causal attention of two packed segments and padding, grouped heads, against plain products."""

    def both() -> tuple[Array, Array]:
        rng, length = np.random.default_rng(1), 128 if small else 1024
        heads, kv_heads, width = (4, 2, 64) if small else (16, 8, 128)
        q, k, v = (
            jnp.asarray(rng.normal(size=(2, length, count, width)), dtype)
            for count in (heads, kv_heads, kv_heads)
        )
        segments = np.ones((2, length), np.int32)
        segments[:, length // 3 :] = 2
        segments[1, -length // 8 :] = 0
        causal = np.tril(np.ones((length, length), bool))
        mask = causal & (segments[:, :, None] == segments[:, None]) & (segments[:, None] > 0)
        weight = jnp.asarray((segments > 0)[:, :, None, None], jnp.float32)  # padding has no meaning
        scoring = Scoring(width**-0.5, None)
        layout = device_layout(jax.devices()[:1])

        def kernel(q: Array, k: Array, v: Array) -> Array:
            return attention(q, k, v, jnp.asarray(mask), scoring, jnp.asarray(segments), layout=layout)

        def plain(q: Array, k: Array, v: Array) -> Array:
            wide = (each.astype(jnp.float32).repeat(heads // each.shape[2], axis=2) for each in (q, k, v))
            q, k, v = wide
            scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) * scoring.scale
            scores = jnp.where(jnp.asarray(mask)[:, None], scores, -1e30)
            return jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(scores, axis=-1), v)

        def wanted(attend: Callable[[Array, Array, Array], Array]) -> Callable[[], Array]:
            def whole(q: Array, k: Array, v: Array) -> Array:
                return attend(q, k, v).astype(jnp.float32) * weight

            if not gradient:
                return lambda: jax.jit(whole)(q, k, v)
            slopes = jax.grad(lambda *given: (whole(*given) ** 2).sum(), argnums=(0, 1, 2))
            return lambda: jnp.concatenate(
                [each.astype(jnp.float32).ravel() for each in jax.jit(slopes)(q, k, v)]
            )

        with jax.default_matmul_precision("highest"):
            reference = wanted(plain)()
        return wanted(kernel)(), reference

    return both


def _product(kept: str, rows: int, dtype: str, small: bool) -> Callable[[], tuple[Array, Array]]:
    """A product with a quantised kernel, against that with its decoded values."""

    def both() -> tuple[Array, Array]:
        rng, width = np.random.default_rng(2), 256 if small else 4096
        values = rng.normal(size=(width, width)).astype(np.float32)
        scheme = quantized.SCHEMES[kept]
        scales = scheme.scales_of(values)
        codes = jnp.asarray(scheme.codes_of(values, scales))
        x = jnp.asarray(rng.normal(size=(rows, width)), dtype)
        with jax.default_matmul_precision("highest"):
            decoded = quantized.decode(codes, jnp.asarray(scales), jnp.dtype("float32"))
            reference = x.astype(jnp.float32) @ decoded
        return jax.jit(quantized.product)(x, codes, jnp.asarray(scales)), reference

    return both
