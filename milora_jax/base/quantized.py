"""Frozen matrices in 8 or 4 bits: their encoding and their products.

A quantised kernel is two arrays, which are laid out, loaded and sliced as all leaves are: ``codes`` of the
kernel's own shape, and ``scales`` with one row per block of input rows. The dtype of the codes decides their
meaning: int8 is a number times its column's scale; uint4 is an index into NF4's table (QLoRA, arXiv
2305.14314, Appendix E) times the scale of its block of 64 rows. Accelerators pack two uint4 into a byte; on a
CPU JAX gives each a byte. (Packed by hand into uint8 they take half a byte there too, but XLA for TPUs then
writes the decoded matrix before every product.)

A product writes no full-size copy of its matrix. It is one product where XLA decodes inside it, and goes tile
by tile where XLA would first write the whole decoded matrix: on a CPU, for NF4 on a GPU, and on a TPU for NF4
with many rows of input, or float32. A decoded tile fits a cache, or the vector memory of a TPU. (The
exception is int8 on GPUs before Ampere, for which XLA has no such product.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

from milora_jax.errors import require
from milora_jax.shapes import Array, Float, Shaped

# fmt: off
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
"""The 16 values of NF4: quantiles of a normal distribution, with an exact zero."""

MIDPOINTS = tuple((low + high) / 2 for low, high in pairwise(NF4_VALUES))

TILE_BYTES = 2**22
"""Bytes of a decoded tile. On a CPU 4 MiB are as fast as any size, and four times as fast as all of a 2048 x
5632 matrix; on a v5e such tiles never leave the vector memory."""

GPU_TILE_BYTES = 2**25
"""The same on a GPU, where every tile costs two launches; the second-level cache holds it."""

ENCODED_ROWS = 64
"""Rows of a kernel that are encoded at a time, a divisor of every scheme's block."""

FUSED_ROWS = 512
"""Rows of input up to which XLA for TPUs decodes NF4 inside the product; with 4096 it writes a copy first."""


@dataclass(frozen=True)
class Scheme:
    """An encoding of kernels.

    Attributes:
      codes_dtype, scales_dtype: dtypes of the two arrays.
      block: input rows that share a scale; 0 for all rows of a column.
      largest: value, before the scale, of the code of the largest magnitude of a block.
      encode: maps ratios of values to scales to codes.
    """

    codes_dtype: str
    scales_dtype: str
    block: int
    largest: float
    encode: Callable[[np.ndarray], np.ndarray]

    def blocks(self, d_in: int, name: str) -> int:
        """Number of rows of the scales of a kernel with ``d_in`` input rows.

        Raises:
          UserError: the blocks do not divide the rows of the kernel ``name``.
        """
        if not self.block:
            return 1
        require(d_in % self.block == 0, f"input width of {name}", d_in, f"a multiple of {self.block} for NF4")
        return d_in // self.block

    def scales_of(self, values: Float[np.ndarray, "d_in d_out"]) -> Float[np.ndarray, "blocks d_out"]:
        """The largest magnitude of every block, over ``largest``; 1 for a block of zeros."""
        blocks = values.reshape(-1, self.block or values.shape[0], values.shape[1])
        scales = np.abs(blocks).max(axis=1) / np.float32(self.largest)
        return np.where(scales > 0, scales, np.float32(1)).astype(jnp.dtype(self.scales_dtype))

    def codes_of(
        self, values: Float[np.ndarray, "d_in d_out"], scales: Float[np.ndarray, "blocks d_out"]
    ) -> Shaped[np.ndarray, "d_in d_out"]:
        """The codes of values, given their scales."""
        each = values.shape[0] // scales.shape[0]
        codes = np.empty(values.shape, jnp.dtype(self.codes_dtype))
        scales = scales.astype(np.float32)
        for start in range(0, values.shape[0], ENCODED_ROWS):  # intermediate values stay in the cache
            here = slice(start, start + ENCODED_ROWS)
            codes[here] = self.encode(values[here] / scales[start // each])
        return codes


def _rounded(ratios: np.ndarray) -> np.ndarray:
    return np.rint(ratios).clip(-127, 127).astype(np.int8)


def _nearest(ratios: np.ndarray) -> np.ndarray:
    places = np.zeros(ratios.shape, np.uint8)
    for middle in MIDPOINTS:  # a binary search takes three times as long
        places += ratios > np.float32(middle)
    return places


SCHEMES = {
    "int8": Scheme("int8", "float32", 0, 127.0, _rounded),
    "nf4": Scheme("uint4", "bfloat16", 64, 1.0, _nearest),
}
"""The encodings by their names in ``config.QUANTIZE``."""


def bits_of(dtype: jnp.dtype) -> int:
    """Bits of a number on an accelerator, which packs two numbers of four bits into a byte."""
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).bits


@functools.partial(jax.jit, static_argnames="dtype", inline=True)
def decode(
    codes: Shaped[Array, "*L d_in d_out"], scales: Float[Array, "*L blocks d_out"], dtype: jnp.dtype
) -> Float[Array, "*L d_in d_out"]:
    """Decode a kernel, or rows or columns of one.

    It is compiled even if the caller is not: op by op it would hold many arrays of the kernel's size. It is
    inlined if the caller is compiled: a separate function would not be fused with its reader.
    """
    if codes.dtype == jnp.int8:
        return (codes.astype(jnp.float32) * jnp.broadcast_to(scales, codes.shape)).astype(dtype)
    by_block = _table_values(codes, dtype).reshape(*scales.shape[:-1], -1, scales.shape[-1])
    factors = jnp.broadcast_to(scales.astype(dtype)[..., None, :], by_block.shape)
    return (by_block * factors).reshape(codes.shape)


def _table_values(codes: Shaped[Array, "*S"], dtype: jnp.dtype) -> Float[Array, "*S"]:
    """The values of NF4's codes, before the scale."""
    # Four rounds of binary selection: unlike a table look-up, any compiler fuses them.
    places = codes.astype(jnp.int32)
    values: list[Array] = [jnp.full(codes.shape, value, dtype) for value in NF4_VALUES]
    for bit in range(4):
        upper = (places >> bit) & 1 == 1
        values = [jnp.where(upper, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def product(
    x: Float[Array, "*B d_in"], codes: Shaped[Array, "d_in d_out"], scales: Float[Array, "blocks d_out"]
) -> Float[Array, "*B d_out"]:
    """``x W`` of a quantised kernel, which is frozen and has no gradient."""
    rows = x.reshape(-1, x.shape[-1])
    return _product(rows, codes, scales).reshape(*x.shape[:-1], codes.shape[-1])


def transposed_product(
    slope: Float[Array, "M d_out"], codes: Shaped[Array, "d_in d_out"], scales: Float[Array, "blocks d_out"]
) -> Float[Array, "M d_in"]:
    """``s W^T`` of a quantised kernel: what :func:`product` passes backward."""
    return _by_platform(_backward_whole, _backward_tiled, slope, codes, scales)


@jax.custom_vjp
def _product(x: Array, codes: Array, scales: Array) -> Array:
    return _by_platform(_forward_whole, _forward_tiled, x, codes, scales)


def _product_forward(x: Array, codes: Array, scales: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, codes, scales), (codes, scales)


def _product_backward(residuals: tuple[Array, Array], slope: Array) -> tuple[Array, None, None]:
    return transposed_product(slope, *residuals), None, None


_product.defvjp(_product_forward, _product_backward)


def _by_platform(
    whole: Callable[[Array, Array, Array], Array],
    tiled: Callable[..., Array],
    x: Array,
    codes: Array,
    scales: Array,
) -> Array:
    """The product in one piece where the compiler decodes inside it, else in tiles."""
    small = functools.partial(tiled, tile_bytes=TILE_BYTES)
    if codes.dtype == jnp.int8:
        return jax.lax.platform_dependent(x, codes, scales, cpu=small, default=whole)
    large = functools.partial(tiled, tile_bytes=GPU_TILE_BYTES)
    fused = x.shape[0] <= FUSED_ROWS and x.dtype.itemsize == 2
    on_tpu = whole if fused else small
    return jax.lax.platform_dependent(x, codes, scales, cpu=small, tpu=on_tpu, default=large)


def _forward_whole(x: Array, codes: Array, scales: Array) -> Float[Array, "M d_out"]:
    if codes.dtype != jnp.int8:
        return x @ decode(codes, scales, x.dtype)
    summed = jnp.matmul(x, codes.astype(x.dtype), preferred_element_type=jnp.float32)
    return (summed * jnp.broadcast_to(scales, summed.shape)).astype(x.dtype)


def _backward_whole(slope: Array, codes: Array, scales: Array) -> Float[Array, "M d_in"]:
    if codes.dtype != jnp.int8:
        return slope @ decode(codes, scales, slope.dtype).T
    # Divided by the largest scale: multiplied by a scale of 1e-4, a float16 slope would round to zero.
    largest = scales.max()
    shares = jnp.broadcast_to(scales / largest, slope.shape)
    scaled = (slope.astype(jnp.float32) * shares).astype(slope.dtype)
    summed = jnp.matmul(scaled, codes.astype(slope.dtype).T, preferred_element_type=jnp.float32)
    return (summed * largest).astype(slope.dtype)


def _forward_tiled(x: Array, codes: Array, scales: Array, tile_bytes: int) -> Float[Array, "M d_out"]:
    d_in, d_out = codes.shape
    width = _tile(d_out, tile_bytes // (d_in * x.dtype.itemsize), 1)

    def columns(start: Array) -> Array:
        mine = [jax.lax.dynamic_slice_in_dim(part, start, width, axis=1) for part in (codes, scales)]
        return _forward_whole(x, *mine)

    return _tile_by_tile(columns, x.shape[0], d_out, width, x.dtype)


def _backward_tiled(slope: Array, codes: Array, scales: Array, tile_bytes: int) -> Float[Array, "M d_in"]:
    d_in, d_out = codes.shape
    block = d_in // scales.shape[0]
    unit = 1 if scales.shape[0] == 1 else block
    width = _tile(d_in, tile_bytes // (d_out * slope.dtype.itemsize), unit)

    def rows(start: Array) -> Array:
        mine = jax.lax.dynamic_slice_in_dim(codes, start, width, axis=0)
        factors = scales
        if unit == block:
            factors = jax.lax.dynamic_slice_in_dim(scales, start // block, width // block, axis=0)
        return _backward_whole(slope, mine, factors)

    return _tile_by_tile(rows, slope.shape[0], d_in, width, slope.dtype)


def _tile(size: int, most: int, unit: int) -> int:
    """Width of a tile along an axis of ``size``: about ``most``, a multiple of 128 and of ``unit``, chosen so
    that the last tile overlaps the one before it little."""
    step = max(unit, 128)
    count = -(-size // max(step, most))
    return min(size, -(-size // (count * step)) * step)


def _tile_by_tile(
    tile: Callable[[Array], Array], rows: int, size: int, width: int, dtype: jnp.dtype
) -> Float[Array, "M size"]:
    """Compute the columns of an output ``width`` at a time; the last ones may be written twice."""
    if width == size:
        return tile(jnp.zeros((), jnp.int32))

    def write(i: Array, out: Array) -> Array:
        start = jnp.minimum(i * width, size - width)
        return jax.lax.dynamic_update_slice_in_dim(out, tile(start), start, axis=1)

    return jax.lax.fori_loop(0, -(-size // width), write, jnp.zeros((rows, size), dtype))
