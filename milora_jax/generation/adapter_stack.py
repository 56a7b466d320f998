"""Adapters of one method at work on one batch, each row with its own.

An :class:`AdapterStack` holds either one adapter for all rows, or those of a bank on a leading adapter-slot
axis. Prefill runs the prompts of one adapter with :meth:`AdapterStack.of_slot`. Decoding asks
:meth:`AdapterStack.for_batch` for an adapter whose method treats every row by its own. How that is computed
depends on the bank, on the method and on the machine, never on which adapters are in the batch, so that a
row's tokens cannot depend on its neighbours' adapters:

=========  ===============================================================================================
one        a single adapter: plain matrix products
one_hot    a few slots: one product with all slots' matrices, of which a row keeps its own
a kernel   many slots of a TPU or GPU: it reads and multiplies only what a row chose, see
           ``generation.kernel`` and, for which one, ``generation.kernel_choice``
gathered   many slots elsewhere: each row's matrices are copied together once per chunk of steps, or once
           for as long as a request holds the batch slot, see :class:`GatheredAdapters`
=========  ===============================================================================================
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from milora_jax.adapters.inputs import ProjectionGroup, Shape
from milora_jax.adapters.joined import JoinedPairs, by_module
from milora_jax.adapters.low_rank import add
from milora_jax.adapters.protocol import Adapter, Method
from milora_jax.generation.kernel import row_products
from milora_jax.generation.slot_pairs import SlotPairs
from milora_jax.shapes import Array, Float, Int
from milora_jax.types import PyTree

KERNELS = ("tpu", "triton", "mosaic", "tpu interpreted", "triton interpreted")
PATHS = ("one", "one_hot", "gathered", *KERNELS)

FEW_SLOTS = 4
"""Number of slots up to which reading all of them costs less than treating rows one by one."""


def choose_path(method: Method, slots: int, platform: str, fastest_kernel: Callable[[], str]) -> str:
    """Return the path that suits a bank.

    Args:
      slots: number of slots of the bank.
      platform: "cpu", "gpu" or "tpu", as JAX names it.
      fastest_kernel: called where a kernel may serve: returns its path, or "gathered".
    """
    if not method.is_pairs or platform not in ("tpu", "gpu"):
        return "gathered"
    return "one_hot" if slots <= FEW_SLOTS else fastest_kernel()


def laid_out(params: PyTree, path: str) -> PyTree:
    """Return prepared parameters, or a bank of them, as ``path`` stores them."""
    return _on_pairs(lambda pairs: SlotPairs.of(pairs) if path in KERNELS else pairs, params, JoinedPairs)


def _on_pairs(change: Callable[[Any], Any], params: PyTree, kind: type) -> PyTree:
    return jax.tree.map(
        lambda node: change(node) if isinstance(node, kind) else node,
        params,
        is_leaf=lambda node: isinstance(node, kind),
    )


@struct.dataclass
class AdapterStack:
    """Prepared adapters of one method for one base.

    Attributes:
      params: per layer the tree that ``Method.prepare`` gives; but for path "one" its leaves have a
        leading slot axis.
      method: the method that ``Method.served`` returns.
      path: one of :data:`PATHS`.
    """

    params: tuple[PyTree, ...]
    method: Method = struct.field(pytree_node=False)
    shape: Shape = struct.field(pytree_node=False)
    path: str = struct.field(pytree_node=False)

    @classmethod
    def single(cls, adapter: Adapter) -> AdapterStack:
        """Return a stack of one adapter, in the decode layout, for all rows."""
        return cls(params=adapter.params, method=adapter.method, shape=adapter.shape, path="one")

    def of_slot(self, adapter_slot: Int[Array, ""]) -> Adapter:
        """Return the adapter in one slot, for rows that all use it."""
        params = self.params
        if self.path != "one":
            params = jax.tree.map(
                lambda leaf: jax.lax.dynamic_index_in_dim(leaf, adapter_slot, 0, False), params
            )
            params = _on_pairs(SlotPairs.joined, params, SlotPairs)
        return Adapter(params=params, method=self.method, shape=self.shape)

    def of_layer(self, index: int) -> AdapterStack:
        """Return the stack with the parameters of one layer alone."""
        return dataclasses.replace(self, params=(self.params[index],))

    def for_batch(self, adapter_slots: Int[Array, " B"]) -> Adapter:
        """Return an adapter for rows that each use their own.

        Args:
          adapter_slots: slot of each row's adapter.
        """
        if self.path == "one":
            return Adapter(params=self.params, method=self.method, shape=self.shape)
        method: Method
        if self.path == "gathered":
            method = PerRow(self.method)
            params = jax.tree.map(lambda leaf: leaf[adapter_slots], self.params)
        else:
            method = OneHot(self.method) if self.path == "one_hot" else Kernel(self.method, self.path)
            params = tuple(StackedLayer(layer, adapter_slots) for layer in self.params)
        return Adapter(params=params, method=method, shape=self.shape)


@struct.dataclass
class GatheredAdapters:
    """The adapter of every batch slot, copied out of a bank when a request is admitted.

    A request keeps the adapter that it was admitted with, whatever becomes of its slot in the bank. Stands
    where an :class:`AdapterStack` of path "gathered" does, and computes as that would.

    Attributes:
      params: leaves with a leading axis of batch slots.
    """

    params: tuple[PyTree, ...]
    method: Method = struct.field(pytree_node=False)
    shape: Shape = struct.field(pytree_node=False)

    @classmethod
    def empty(cls, adapters: AdapterStack, batch_slots: int) -> GatheredAdapters:
        """Return the state in which all batch slots are free."""

        def vacant(leaf: Array) -> Array:
            return jnp.zeros((batch_slots, *leaf.shape[1:]), leaf.dtype, device=leaf.sharding)

        return cls(jax.tree.map(vacant, adapters.params), adapters.method, adapters.shape)

    def for_batch(self, adapter_slots: Int[Array, " B"]) -> Adapter:
        """Return an adapter for rows that each use their own."""
        del adapter_slots
        return Adapter(params=self.params, method=PerRow(self.method), shape=self.shape)


@functools.partial(jax.jit, donate_argnums=0)
def gather_adapter(
    gathered: GatheredAdapters,
    adapters: AdapterStack,
    batch_slots: Int[Array, " n"],
    adapter_slot: Int[Array, ""],
) -> GatheredAdapters:
    """Copy the adapter of a slot to some batch slots; those beyond the batch are left out."""

    def put(held: Array, bank: Array) -> Array:
        new = jax.lax.dynamic_index_in_dim(bank, adapter_slot, 0, False)
        return held.at[batch_slots].set(new, mode="drop")

    return dataclasses.replace(gathered, params=jax.tree.map(put, gathered.params, adapters.params))


@struct.dataclass
class StackedLayer:
    """One layer of a bank, and which of its adapters each row uses.

    Attributes:
      bank: leaves with a leading adapter-slot axis.
      adapter_slots: slot of each row's adapter.
    """

    bank: PyTree
    adapter_slots: Int[Array, " B"]


@dataclass(frozen=True)
class BatchMethod(Method):
    """A method for decode steps whose rows use different adapters; it has no router and no prefix.

    Attributes:
      method: that of every adapter.
    """

    additive: ClassVar[bool] = True  # the method's own was asked for in prefill
    method: Any = None


@dataclass(frozen=True)
class PerRow(BatchMethod):
    """Applies any method row by row: its hooks are vectorised over rows and their own parameters."""

    def adapt(self, params: PyTree, group: ProjectionGroup) -> tuple[Float[Array, "B T _"], ...]:
        """Return the adapted outputs."""

        def one(params: PyTree, x: Array, outputs: Any, weights: Any) -> Any:
            row = dataclasses.replace(
                group,
                x=x[None],
                outputs=tuple(output[None] for output in outputs),
                weights=None if weights is None else weights[None],
            )
            return tuple(output[0] for output in self.method.adapt(params, row))

        return jax.vmap(one)(params, group.x, group.outputs, group.weights)

    def branch(self, params: PyTree, sublayer: str, x: Float[Array, "B T D"]) -> Float[Array, "B T D"] | None:
        """Return what is added to a sublayer's output."""

        def one(params: PyTree, x: Array) -> Array | None:
            added = self.method.branch(params, sublayer, x[None])
            return None if added is None else added[0]

        return jax.vmap(one)(params, x)


@dataclass(frozen=True)
class OneHot(BatchMethod):
    """Applies methods of low-rank pairs by one product with the matrices of all slots."""

    def adapt(self, params: StackedLayer, group: ProjectionGroup) -> tuple[Float[Array, "B T _"], ...]:
        """Return the adapted outputs."""
        pairs, weights = self.method.pairs_of(params.bank, group)
        slots, _, rank, _ = pairs.b.shape
        u = jnp.einsum("BTD,SDU->BTSU", group.x, pairs.a)
        u = u.reshape(*u.shape[:3], len(pairs.tiles), rank)
        mine = jax.nn.one_hot(params.adapter_slots, slots, dtype=u.dtype)[:, None, :, None, None]
        u = u * mine
        if weights is not None:
            u = u * weights[:, :, None].astype(u.dtype)
        by_tile = jnp.repeat(u, jnp.array(pairs.tiles), axis=3, total_repeat_length=sum(pairs.tiles))
        wide = jnp.einsum("BTSMR,SMRO->MBTO", by_tile, pairs.b)
        return add(group.outputs, by_module(pairs.tiles, wide))


@dataclass(frozen=True)
class Kernel(BatchMethod):
    """Applies methods of low-rank pairs by a kernel that skips the modules that a row did not choose.

    Attributes:
      kernel: the one of ``generation.kernel.row_products``.
    """

    kernel: str = ""

    def adapt(self, params: StackedLayer, group: ProjectionGroup) -> tuple[Float[Array, "B T _"], ...]:
        """Return the adapted outputs."""
        pairs, weights = self.method.pairs_of(params.bank, group)
        rows, tokens, width = group.x.shape
        modules = len(pairs.tiles)
        if weights is None:
            shares = jnp.ones((rows, modules), jnp.float32)
        else:
            shares = weights.astype(jnp.float32).reshape(rows, modules)
        # Each token of a row is a row of the kernel.
        slots, shares = (jnp.repeat(each, tokens, axis=0) for each in (params.adapter_slots, shares))
        wide = row_products(group.x.reshape(rows * tokens, width), pairs, slots, shares, self.kernel)
        return add(group.outputs, by_module(pairs.tiles, wide.reshape(-1, rows, tokens, wide.shape[-1])))
