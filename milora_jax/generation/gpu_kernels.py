"""The products of ``generation.kernel`` on GPUs, in the two languages that Pallas has for them.

Both are two kernels, to the rank and back, whose programs return at once where nothing was chosen. Triton is
what JAX deprecates, and Mosaic GPU, which needs a Hopper GPU or a later one, what it recommends instead.
A decode step reads each matrix once for one token, so neither uses the tensor cores: what counts is that many
programs read at the same time.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from milora_jax.generation.slot_pairs import SlotPairs, module_of_tile
from milora_jax.shapes import Array

LARGEST_BLOCK = 512
"""The largest number of inputs or outputs that a program holds at a time."""

WARPGROUP = 128
"""Threads of a program in Mosaic GPU, each of which holds as many elements of a block as the others."""


def mosaic_serves(pairs: SlotPairs) -> bool:
    """Whether the threads of a program can divide the inputs and the outputs of the pairs evenly."""
    return all(
        math.gcd(size, LARGEST_BLOCK) % WARPGROUP == 0 for size in (pairs.a.shape[-1], pairs.b.shape[-1])
    )


def mosaic_products(x: Array, pairs: SlotPairs, slot: Array, share: Array) -> Array:
    """Compute ``kernel.row_products`` in Mosaic GPU; a program for each row, module and rank, then for each
    row and block of outputs."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu

    rows, d_in = x.shape
    modules = len(pairs.tiles)
    count, rank, width = pairs.b.shape[1:]
    in_block, out_block = math.gcd(d_in, LARGEST_BLOCK), math.gcd(width, LARGEST_BLOCK)
    modules_of_tiles = jnp.array(module_of_tile(pairs.tiles), jnp.int32)

    def narrow(slot: Any, share: Any, x: Any, a: Any, u: Any) -> None:
        row, module, place = (jax.lax.axis_index(name) for name in ("row", "module", "rank"))
        mine = share[row, module]

        @pl.when(mine == 0)
        def _() -> None:
            u[row, module, place] = jnp.zeros((), u.dtype)

        @pl.when(mine != 0)
        def _() -> None:
            owner = slot[row]

            def block(i: Any) -> Any:
                here = pl.ds(i * in_block, in_block)
                return a[owner, module, place, here].astype(jnp.float32) * x[row, here].astype(jnp.float32)

            # The first block begins the sum: zeros would have another layout in the registers.
            total = jax.lax.fori_loop(1, d_in // in_block, lambda i, sums: sums + block(i), block(0))
            u[row, module, place] = (total.sum() * mine).astype(u.dtype)

    def widen(slot: Any, share: Any, modules_of_tiles: Any, u: Any, b: Any, out: Any) -> None:
        row, tile, part = (jax.lax.axis_index(name) for name in ("row", "tile", "part"))
        here, module = pl.ds(part * out_block, out_block), modules_of_tiles[tile]
        mine = share[row, module]

        @pl.when(mine == 0)
        def _() -> None:
            out[tile, row, here] = jnp.zeros((out_block,), out.dtype)

        @pl.when(mine != 0)
        def _() -> None:
            owner = slot[row]

            def scaled(place: Any) -> Any:
                return b[owner, tile, place, here].astype(jnp.float32) * u[row, module, place].astype(
                    jnp.float32
                )

            total = jax.lax.fori_loop(1, rank, lambda place, sums: sums + scaled(place), scaled(0))
            out[tile, row, here] = total.astype(out.dtype)

    u = mosaic_gpu.kernel(
        narrow,
        out_type=jax.ShapeDtypeStruct((rows, modules, rank), x.dtype),
        grid=(rows, modules, rank),
        grid_names=("row", "module", "rank"),
    )(slot, share, x, pairs.a)
    return mosaic_gpu.kernel(
        widen,
        out_type=jax.ShapeDtypeStruct((count, rows, width), x.dtype),
        grid=(rows, count, width // out_block),
        grid_names=("row", "tile", "part"),
    )(slot, share, modules_of_tiles, u, pairs.b)


def triton_products(x: Array, pairs: SlotPairs, slot: Array, share: Array, interpret: bool) -> Array:
    """Compute ``kernel.row_products`` in Triton, whose blocks and ranks are powers of two."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    rows, d_in = x.shape
    modules = len(pairs.tiles)
    count, rank, width = pairs.b.shape[1:]
    in_block, out_block = math.gcd(d_in, LARGEST_BLOCK), math.gcd(width, LARGEST_BLOCK)
    modules_of_tiles = jnp.array(module_of_tile(pairs.tiles), jnp.int32)

    def narrow(slot: Any, share: Any, x: Any, a: Any, u: Any) -> None:
        row, module = pl.program_id(0), pl.program_id(1)
        mine = share[row, module]

        @pl.when(mine == 0)
        def _() -> None:
            u[row, module, :] = jnp.zeros((rank,), u.dtype)

        @pl.when(mine != 0)
        def _() -> None:
            owner = slot[row]

            def add_block(i: Any, total: Any) -> Any:
                here = pl.ds(i * in_block, in_block)
                part = a[owner, module, :, here].astype(jnp.float32) * x[row, here].astype(jnp.float32)[None]
                return total + part.sum(axis=1)

            total = jax.lax.fori_loop(0, d_in // in_block, add_block, jnp.zeros((rank,), jnp.float32))
            u[row, module, :] = (total * mine).astype(u.dtype)

    def widen(slot: Any, share: Any, modules_of_tiles: Any, u: Any, b: Any, out: Any) -> None:
        row, tile = pl.program_id(0), pl.program_id(1)
        here = pl.ds(pl.program_id(2) * out_block, out_block)
        module = modules_of_tiles[tile]
        mine = share[row, module]

        @pl.when(mine == 0)
        def _() -> None:
            out[tile, row, here] = jnp.zeros((out_block,), out.dtype)

        @pl.when(mine != 0)
        def _() -> None:
            part = b[slot[row], tile, :, here].astype(jnp.float32)
            narrow = u[row, module, :].astype(jnp.float32)
            out[tile, row, here] = (part * narrow[:, None]).sum(axis=0).astype(out.dtype)

    u = pl.pallas_call(
        narrow,
        grid=(rows, modules),
        out_shape=jax.ShapeDtypeStruct((rows, modules, rank), x.dtype),
        interpret=interpret,
        compiler_params=triton.CompilerParams(),
        name="row_products_narrow",
    )(slot, share, x, pairs.a)
    return pl.pallas_call(
        widen,
        grid=(rows, count, width // out_block),
        out_shape=jax.ShapeDtypeStruct((count, rows, width), x.dtype),
        interpret=interpret,
        compiler_params=triton.CompilerParams(),
        name="row_products_widen",
    )(slot, share, modules_of_tiles, u, pairs.b)
