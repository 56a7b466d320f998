"""The feed-forward layer of a base with experts: a frozen router sends every token through C of X experts.

A token's row is copied C times, the copies are sorted by expert, and each expert multiplies its own. Shapes
are static: an expert's rows are filled up to whole blocks of :data:`LARGEST_BLOCK` rows or fewer, and behind
the last block there is room for the worst case, which no product reads. No token is dropped.

A product is ``jax.lax.ragged_dot``, for which TPUs and GPUs have kernels. On a CPU that function multiplies
every row by every expert; there, and where the kernels are quantised, the blocks are multiplied one by one,
and only those that hold rows (docs/performance.md). The kernels are frozen, so that only the rows have a
gradient.

On several devices each sorts its own rows. Rows are gathered over the mesh axis that divides the experts, a
device multiplies those that chose one of its own, and the sums go back to the devices of the rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from milora_jax.base import ops, quantized
from milora_jax.base.attention import DeviceLayout
from milora_jax.base.modules import Experts, Linear
from milora_jax.model_config import ModelConfig
from milora_jax.shapes import Array, Float, Int, Shaped
from milora_jax.types import kept

LARGEST_BLOCK = 64
"""Rows of one expert that are multiplied at a time."""


class Choice(NamedTuple):
    """The experts that the base's router chose.

    Attributes:
      weights: factor of each chosen expert's output, in float32.
      ids: numbers of the chosen experts.
    """

    weights: Float[Array, "B T C"]
    ids: Int[Array, "B T C"]


def choose(config: ModelConfig, experts: Experts, x: Float[Array, "B T D"]) -> Choice:
    """Choose each token's experts: the C of the largest probabilities, which are a softmax in float32.

    The weights are these probabilities, divided by their sum with ``config.norm_topk_prob``.
    """
    logits = jnp.einsum("BTD,DX->BTX", x, experts.router[...])
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, ids = jax.lax.top_k(probs, config.experts_per_token)
    if config.norm_topk_prob:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return Choice(weights, ids)


def through_experts(
    config: ModelConfig,
    experts: Experts,
    x: Float[Array, "B T D"],
    changes: tuple[Float[Array, "B T F"], ...] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T F"]]:
    """The feed-forward layer: ``sum_c w_c down_c(act(gate_c x) * up_c x)``.

    Args:
      changes: terms added to the gate's and the up's product of every chosen expert of a token, before the
        activation.

    Returns:
      The output, and the sum of the chosen experts' hidden states with the same weights: the input of what
      adds the same linear map to ``down`` of every expert.
    """
    with jax.named_scope("experts"):
        choice = choose(config, experts, x)
        layout = experts.layout
        count = config.num_experts
        if layout is None or layout.mesh is None or layout.mesh.size == 1:
            kernels = (experts.into, experts.down)
            return _mix(config.activation, count, None, x, choice, changes, kernels)
        return _over_devices(config, experts, layout, x, choice, changes)


Kernels = tuple[tuple[Linear, ...], Linear]
"""``(gate, up)`` or the two joined, and ``down``."""


def _mix(
    activation: str,
    count: int,
    first: Array | None,
    x: Float[Array, "B T D"],
    choice: Choice,
    changes: tuple[Float[Array, "B T F"], ...] | None,
    kernels: Kernels,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T F"]]:
    """:func:`through_experts` over ``count`` experts, of which the first has the number ``first``; others add
    nothing.
    """
    into, down = kernels
    rows, length, width = x.shape
    ids = choice.ids.reshape(rows * length, -1)
    ids = ids if first is None else ids - first
    blocks = Blocks.of(jnp.where((ids >= 0) & (ids < count), ids, count), count)
    sorted_rows = blocks.spread(x.reshape(rows * length, width))
    products = [_product(sorted_rows, linear, blocks) for linear in into]
    if changes is not None:
        added = [change.reshape(rows * length, -1) for change in changes]
        added = added if len(products) == 2 else [jnp.concatenate(added, axis=-1)]
        products = [y + blocks.spread(change) for y, change in zip(products, added, strict=True)]
    gate, up = kept(products if len(products) == 2 else jnp.split(products[0], 2, axis=-1))
    hidden = ops.gated(gate, up, activation)
    output = kept(_product(hidden, down, blocks))
    weights = choice.weights.reshape(rows * length, -1)

    def mixed(values: Array) -> Array:
        each = blocks.collect(values).astype(jnp.float32)
        return jnp.einsum("MCF,MC->MF", each, weights).astype(x.dtype).reshape(rows, length, -1)

    return mixed(output), mixed(hidden)


def _over_devices(
    config: ModelConfig,
    experts: Experts,
    layout: DeviceLayout,
    x: Float[Array, "B T D"],
    choice: Choice,
    changes: tuple[Float[Array, "B T F"], ...] | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T F"]]:
    """:func:`through_experts`, each device with its own rows and experts."""
    mesh, axis = layout.mesh, layout.experts
    if mesh is None:
        raise AssertionError("a layout of several devices has a mesh")
    parts = 1 if axis is None else mesh.shape[axis]
    wide = layout.widths_of(config.intermediate_size)
    rows = layout.rows if x.shape[0] % layout.row_parts == 0 else None
    split_rows = rows is not None and axis is not None and axis in rows
    count = config.num_experts // parts

    def local(x: Array, choice: Choice, changes: tuple | None, kernels: Kernels) -> tuple[Array, Array]:
        first = None if axis is None else jax.lax.axis_index(axis) * count
        if split_rows:
            x, choice, changes = jax.tree.map(
                lambda leaf: jax.lax.all_gather(leaf, axis, tiled=True), (x, choice, changes)
            )
        output, hidden = _mix(config.activation, count, first, x, choice, changes, kernels)
        if wide is not None:
            output = jax.lax.psum(output, wide)
        if axis is None:
            return output, hidden
        if split_rows:
            scatter = functools.partial(jax.lax.psum_scatter, axis_name=axis, tiled=True)
            return scatter(output), scatter(hidden)
        return jax.lax.psum((output, hidden), axis)

    by_row, by_width = jax.P(rows, None, None), jax.P(rows, None, wide)
    kernels = (experts.into, experts.down)

    def of_kernel(linear: Linear, *axes: str | tuple[str, ...] | None) -> Linear:
        scales = None if linear.scales is None else jax.P(axis, None, axes[1])
        return Linear(jax.P(axis, *axes), None, scales)

    specs = (tuple(of_kernel(each, None, wide) for each in kernels[0]), of_kernel(kernels[1], wide, None))
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(
            by_row,
            by_row,
            None if changes is None else (by_width,) * 2,
            specs,
        ),
        out_specs=(by_row, by_width),
        check_vma=False,
    )(x, choice, changes, kernels)


@dataclass(frozen=True)
class Blocks:
    """Copies of rows, sorted by expert and filled up to blocks of one size.

    Attributes:
      size: rows of a block.
      source: the row that a place holds; a number beyond the rows for a place that holds none.
      place: the place of each copy of a row; a number beyond the places for a copy without an expert.
      copy: the inverse of ``place``: number of the copy in each place, in the order of rows.
      expert: the expert of each block.
      used: number of blocks that hold rows.
      sizes: places of each expert's blocks.
    """

    size: int
    source: Int[Array, " P"]
    place: Int[Array, "M C"]
    copy: Int[Array, " P"]
    expert: Int[Array, " blocks"]
    used: Int[Array, ""]
    sizes: Int[Array, " X"]

    @classmethod
    def of(cls, ids: Int[Array, "M C"], count: int) -> Blocks:
        """Sort the copies of M rows.

        Args:
          ids: the expert of each copy; ``count`` for one without an expert.
        """
        rows, chosen = ids.shape
        copies = rows * chosen
        size = block_size(copies, count)
        number = (copies + min(count, copies) * (size - 1)) // size
        flat = ids.reshape(-1).astype(jnp.int32)
        order = jnp.argsort(flat, stable=True).astype(jnp.int32)
        sizes = jnp.zeros(count + 1, jnp.int32).at[flat].add(1)[:count]
        blocks = -(-sizes // size)
        ends = jnp.cumsum(blocks)
        starts = jnp.concatenate([(ends - blocks) * size, jnp.full(1, number * size, jnp.int32)])
        before = jnp.concatenate([jnp.cumsum(sizes) - sizes, sizes.sum()[None]])
        mine = flat[order]
        within = jnp.arange(copies, dtype=jnp.int32) - before[mine]
        sorted_place = starts[mine] + within
        place = jnp.zeros(copies, jnp.int32).at[order].set(sorted_place)
        empty = jnp.full(number * size, copies, jnp.int32)
        copy = empty.at[sorted_place].set(order, mode="drop")
        last = jnp.searchsorted(ends, jnp.arange(number, dtype=jnp.int32), side="right")
        return cls(
            size=size,
            source=jnp.where(copy < copies, copy // chosen, rows),
            place=place.reshape(rows, chosen),
            copy=copy,
            expert=jnp.minimum(last, count - 1).astype(jnp.int32),
            used=ends[-1],
            sizes=blocks * size,
        )

    def spread(self, rows: Float[Array, "M W"]) -> Float[Array, "P W"]:
        """Copy rows to their places; zeros elsewhere."""
        return _taken(rows, self.source, self.place)

    def collect(self, values: Float[Array, "P W"]) -> Float[Array, "M C W"]:
        """The values of every copy of every row; zeros for a copy without an expert."""
        return _taken(values, self.place, self.copy[:, None])


def block_size(copies: int, count: int) -> int:
    """Rows of a block: a power of two near the mean number of rows of an expert, so that little is empty.

    >>> block_size(8, 128), block_size(64, 16), block_size(8192, 16)
    (1, 8, 64)
    """
    size = 1
    while size < LARGEST_BLOCK and size * count < 2 * copies:
        size *= 2
    return size


@jax.custom_vjp
def _taken(
    values: Float[Array, "V W"], there: Int[Array, "*S"], back: Int[Array, "V k"]
) -> Float[Array, "*S W"]:
    """``values[there]``, zeros for numbers beyond it. Its gradient is a gather as well, by ``back``: which
    results each value became. XLA for CPUs scatters far more slowly.
    """
    return values.at[there].get(mode="fill", fill_value=0)


def _taken_forward(values: Array, there: Array, back: Array) -> tuple[Array, Array]:
    return _taken(values, there, back), back


def _taken_backward(back: Array, slope: Array) -> tuple[Array, None, None]:
    flat = slope.reshape(-1, slope.shape[-1])
    return flat.at[back].get(mode="fill", fill_value=0).sum(axis=1), None, None


_taken.defvjp(_taken_forward, _taken_backward)


def _product(rows: Float[Array, "P d_in"], linear: Linear, blocks: Blocks) -> Float[Array, "P d_out"]:
    """Every block times the kernel of its expert."""
    scales = None if linear.scales is None else linear.scales[...]
    return _grouped(rows, linear.kernel[...], scales, blocks.expert, blocks.used, blocks.sizes)


@jax.custom_vjp
def _grouped(
    rows: Array, kernel: Array, scales: Array | None, expert: Array, used: Array, sizes: Array
) -> Array:
    def one(block: Array, number: Array) -> Array:
        mine = jax.lax.dynamic_index_in_dim(kernel, number, 0, keepdims=False)
        if scales is None:
            return block @ mine
        return quantized.product(block, mine, jax.lax.dynamic_index_in_dim(scales, number, 0, keepdims=False))

    looped = functools.partial(_block_by_block, one, kernel.shape[-1])
    if scales is not None:
        return looped(rows, expert, used)
    return jax.lax.platform_dependent(
        rows,
        kernel,
        expert,
        used,
        sizes,
        cpu=lambda rows, kernel, expert, used, sizes: looped(rows, expert, used),
        default=lambda rows, kernel, expert, used, sizes: jax.lax.ragged_dot(rows, kernel, sizes),
    )


_TRANSPOSED = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
"""Rows times the transposed kernel of their group."""


def _grouped_forward(
    rows: Array, kernel: Array, scales: Array | None, expert: Array, used: Array, sizes: Array
) -> tuple[Array, tuple]:
    return _grouped(rows, kernel, scales, expert, used, sizes), (kernel, scales, expert, used, sizes)


def _grouped_backward(residuals: tuple, slope: Array) -> tuple[Array, None, None, None, None, None]:
    kernel, scales, expert, used, sizes = residuals

    def one(block: Array, number: Array) -> Array:
        mine = jax.lax.dynamic_index_in_dim(kernel, number, 0, keepdims=False)
        if scales is None:
            return jnp.einsum("SF,DF->SD", block, mine)
        factors = jax.lax.dynamic_index_in_dim(scales, number, 0, keepdims=False)
        return quantized.transposed_product(block, mine, factors)

    looped = functools.partial(_block_by_block, one, kernel.shape[-2])
    if scales is not None:
        back = looped(slope, expert, used)
    else:
        back = jax.lax.platform_dependent(
            slope,
            kernel,
            expert,
            used,
            sizes,
            cpu=lambda slope, kernel, expert, used, sizes: looped(slope, expert, used),
            default=lambda slope, kernel, expert, used, sizes: jax.lax.ragged_dot_general(
                slope, kernel, sizes, _TRANSPOSED
            ),
        )
    return back, None, None, None, None, None


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _block_by_block(
    one: Callable[[Array, Array], Array],
    width: int,
    rows: Float[Array, "P _"],
    expert: Int[Array, " blocks"],
    used: Int[Array, ""],
) -> Shaped[Array, "P width"]:
    """The blocks that hold rows, one after the other; zeros behind them."""
    size = rows.shape[0] // expert.shape[0]

    def write(i: Array, out: Array) -> Array:
        block = jax.lax.dynamic_slice_in_dim(rows, i * size, size)
        return jax.lax.dynamic_update_slice_in_dim(out, one(block, expert[i]), i * size, 0)

    return jax.lax.fori_loop(0, used, write, jnp.zeros((rows.shape[0], width), rows.dtype))
