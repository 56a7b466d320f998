"""Low-rank products of rows that each have their own adapter, reading only the modules that a row chose.

For row i with slot s and the chosen modules m of a projection group the kernels compute
``share[i, m] * x[i] A[s, m] B[s, m]`` (Eq. 1 and 3 of the paper, one token per row). A pair of row and
module whose share is 0 is neither read nor multiplied. With many tenants in a batch the adapters are
most of what a step reads beside the base, so the bytes follow the k chosen experts, not all seven.

On a TPU one kernel walks over rows and tiles; a step that was not chosen points at the block that is
already there, so that nothing is copied (the pipeline fetches a block only when its index changes).
``generation.gpu_kernels`` has those of GPUs. In tests the kernels run in Pallas' interpreter.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from milora_jax.generation.gpu_kernels import mosaic_products, triton_products
from milora_jax.generation.slot_pairs import SlotPairs, module_of_tile
from milora_jax.shapes import Array, Float, Int


def row_products(
    x: Float[Array, "B d_in"],
    pairs: SlotPairs,
    slot: Int[Array, " B"],
    share: Float[Array, "B M"],
    kernel: str,
) -> Float[Array, "tiles B width"]:
    """Return what each row's own pairs add to its outputs, computed tile by tile.

    Args:
      pairs: pairs of all slots.
      slot: whose pairs a row uses.
      share: factor of each module's product; 0 leaves the module out.
      kernel: "tpu", "triton" or "mosaic"; with "tpu interpreted" or "triton interpreted" that kernel runs in
        Pallas' interpreter.
    """
    kind, _, interpreted = kernel.partition(" ")
    given = x, pairs, slot.astype(jnp.int32), share.astype(jnp.float32)
    if kind == "mosaic":
        return mosaic_products(*given)
    run = {"tpu": _on_tpu, "triton": triton_products}[kind]
    return run(*given, bool(interpreted))


def visits(
    slot: Int[Array, " B"], share: Float[Array, "B M"], tiles: tuple[int, ...]
) -> tuple[Int[Array, "steps 3"], Int[Array, " steps"]]:
    """Return the blocks that each step of the TPU kernel's grid (row by row, tile by tile) has in memory.

    Returns:
      Slot, module and tile per step: its own where its share is not 0, else those of the last step that
      had a share (of the first to have one, before it), and whether the step has one.
    """
    module = jnp.array(module_of_tile(tiles), jnp.int32)
    rows, count = share.shape[0], module.size
    active = (share[:, module] != 0).reshape(-1)
    steps = jnp.arange(active.size)
    last = jax.lax.cummax(jnp.where(active, steps, -1))
    source = jnp.where(last < 0, jnp.argmax(active), last)
    own = jnp.stack(
        [
            jnp.repeat(slot, count, total_repeat_length=rows * count),
            jnp.tile(module, rows),
            jnp.tile(jnp.arange(count, dtype=jnp.int32), rows),
        ],
        axis=1,
    )
    return own[source], active.astype(jnp.int32)


def _on_tpu(x: Array, pairs: SlotPairs, slot: Array, share: Array, interpret: bool) -> Array:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    rows, d_in = x.shape
    count, rank, width = pairs.b.shape[1:]
    where, active = visits(slot, share, pairs.tiles)
    shares = share[:, jnp.array(module_of_tile(pairs.tiles))].reshape(-1)

    def kernel(where: Any, active: Any, shares: Any, x: Any, a: Any, b: Any, out: Any) -> None:
        step = pl.program_id(0) * count + pl.program_id(1)

        @pl.when(active[step] == 0)
        def _() -> None:
            out[...] = jnp.zeros_like(out)

        @pl.when(active[step] != 0)
        def _() -> None:
            u = jax.lax.dot_general(
                x[0], a[0, 0], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
            )
            u = (u * shares[step]).astype(x.dtype)
            out[0, 0] = jnp.dot(u, b[0, 0], preferred_element_type=jnp.float32).astype(out.dtype)

    def block_of_a(row: Any, tile: Any, where: Any, *_: Any) -> tuple:
        step = row * count + tile
        return where[step, 0], where[step, 1], 0, 0

    def block_of_b(row: Any, tile: Any, where: Any, *_: Any) -> tuple:
        step = row * count + tile
        return where[step, 0], where[step, 2], 0, 0

    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(rows, count),
            in_specs=[
                pl.BlockSpec((1, 1, d_in), lambda row, *_: (row, 0, 0)),
                pl.BlockSpec((1, 1, rank, d_in), block_of_a),
                pl.BlockSpec((1, 1, rank, width), block_of_b),
            ],
            out_specs=pl.BlockSpec((1, 1, 1, width), lambda row, tile, *_: (tile, row, 0, 0)),
        ),
        out_shape=jax.ShapeDtypeStruct((count, rows, 1, width), x.dtype),
        interpret=interpret,
        name="row_products",
    )
    return call(where, active, shares, x[:, None], pairs.a, pairs.b)[:, :, 0]
