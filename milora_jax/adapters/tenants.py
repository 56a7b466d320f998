"""Adapters of several tenants at work on the rows of one batch.

A :class:`Tenants` holds either one adapter for all rows or a bank of them, stacked on a leading slot
axis. Prefill runs one tenant's prompts with :meth:`Tenants.of_slot`. Decoding asks
:meth:`Tenants.for_rows` for an adapter whose method treats every row by its own tenant. Which way is
taken depends on the bank, on the method and on the machine, never on who sits in the batch, so that a
row's tokens cannot depend on its neighbours' tenants:

=========  ===============================================================================================
one        a single adapter: plain matrix products
one_hot    a few slots: one product with all slots' matrices, of which a row keeps its own
tpu, gpu   many slots there: a kernel that reads and multiplies only what a row chose
gathered   many slots elsewhere: each row's matrices are copied together once per chunk of steps, or once
           for as long as somebody has the row, see :class:`Seats`
=========  ===============================================================================================
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from milora_jax.adapters.inputs import ProjectionGroup, Shape
from milora_jax.adapters.joined import JoinedPairs, by_module
from milora_jax.adapters.kernel import SlotPairs, row_products
from milora_jax.adapters.low_rank import add
from milora_jax.adapters.protocol import Adapter, Method
from milora_jax.shapes import Array, Float, Int
from milora_jax.types import PyTree

KERNELS = ("tpu", "gpu", "tpu interpreted", "gpu interpreted")
PATHS = ("one", "one_hot", "gathered", *KERNELS)

FEW_SLOTS = 4
"""Up to so many slots, reading all of them costs less than treating rows one by one."""


def choose_path(method: Method, slots: int, platform: str) -> str:
    """The way that suits a bank.

    Args:
      slots: of the bank.
      platform: "cpu", "gpu" or "tpu", as JAX names it.
    """
    if not method.is_pairs or platform not in ("tpu", "gpu"):
        return "gathered"
    return "one_hot" if slots <= FEW_SLOTS else platform


def laid_out(params: PyTree, path: str) -> PyTree:
    """Prepared parameters, or a bank of them, as ``path`` stores them."""
    return _on_pairs(lambda pairs: SlotPairs.of(pairs) if path in KERNELS else pairs, params, JoinedPairs)


def _on_pairs(change: Callable[[Any], Any], params: PyTree, kind: type) -> PyTree:
    return jax.tree.map(
        lambda node: change(node) if isinstance(node, kind) else node,
        params,
        is_leaf=lambda node: isinstance(node, kind),
    )


@struct.dataclass
class Tenants:
    """Prepared adapters of one method for one base.

    Attributes:
      params: per layer the tree that ``Method.prepare`` gives; but for path "one" its leaves have a
        leading slot axis.
      method: as ``Method.served`` gives it.
      path: one of :data:`PATHS`.
    """

    params: tuple[PyTree, ...]
    method: Method = struct.field(pytree_node=False)
    shape: Shape = struct.field(pytree_node=False)
    path: str = struct.field(pytree_node=False)

    @classmethod
    def single(cls, adapter: Adapter) -> Tenants:
        """One adapter, in the decode layout, for all rows."""
        return cls(params=adapter.params, method=adapter.method, shape=adapter.shape, path="one")

    def of_slot(self, slot: Int[Array, ""]) -> Adapter:
        """The adapter in one slot, for rows that are all this tenant's."""
        params = self.params
        if self.path != "one":
            params = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, slot, 0, False), params)
            params = _on_pairs(SlotPairs.joined, params, SlotPairs)
        return Adapter(params=params, method=self.method, shape=self.shape)

    def for_rows(self, tenant: Int[Array, " B"]) -> Adapter:
        """An adapter for rows that each have their own tenant.

        Args:
          tenant: the slot of each row.
        """
        if self.path == "one":
            return Adapter(params=self.params, method=self.method, shape=self.shape)
        method: Method
        if self.path == "gathered":
            method = PerRow(self.method)
            params = jax.tree.map(lambda leaf: leaf[tenant], self.params)
        else:
            method = OneHot(self.method) if self.path == "one_hot" else Kernel(self.method, self.path)
            params = tuple(Slots(layer, tenant) for layer in self.params)
        return Adapter(params=params, method=method, shape=self.shape)


@struct.dataclass
class Seats:
    """The adapters of a batch's rows, copied out of a bank when somebody takes the row.

    What a row has it keeps, whatever becomes of its slot in the bank. Stands where a :class:`Tenants` of path
    "gathered" does, and treats rows as that would.

    Attributes:
      params: leaves with a leading row axis.
    """

    params: tuple[PyTree, ...]
    method: Method = struct.field(pytree_node=False)
    shape: Shape = struct.field(pytree_node=False)

    @classmethod
    def empty(cls, tenants: Tenants, rows: int) -> Seats:
        """Rows that nobody has taken."""

        def vacant(leaf: Array) -> Array:
            return jnp.zeros((rows, *leaf.shape[1:]), leaf.dtype, device=leaf.sharding)

        return cls(jax.tree.map(vacant, tenants.params), tenants.method, tenants.shape)

    def for_rows(self, tenant: Int[Array, " B"]) -> Adapter:
        """An adapter for rows that each have their own."""
        del tenant
        return Adapter(params=self.params, method=PerRow(self.method), shape=self.shape)


@functools.partial(jax.jit, donate_argnums=0)
def take_seats(seats: Seats, tenants: Tenants, rows: Int[Array, " n"], slot: Int[Array, ""]) -> Seats:
    """Copy the adapter of a slot to some rows; rows beyond the batch are left out."""

    def put(mine: Array, bank: Array) -> Array:
        return mine.at[rows].set(jax.lax.dynamic_index_in_dim(bank, slot, 0, False), mode="drop")

    return dataclasses.replace(seats, params=jax.tree.map(put, seats.params, tenants.params))


@struct.dataclass
class Slots:
    """One layer of a bank and where each row finds its own.

    Attributes:
      bank: leaves with a leading slot axis.
      tenant: the slot of each row.
    """

    bank: PyTree
    tenant: Int[Array, " B"]


@dataclass(frozen=True)
class Rows(Method):
    """A method for decoding whose rows have different tenants; it has no router and no prefix.

    Attributes:
      method: what every tenant's adapter is.
    """

    method: Any = None


@dataclass(frozen=True)
class PerRow(Rows):
    """Any method, row by row: its hooks are vectorised over rows and their own parameters."""

    def adapt(self, params: PyTree, group: ProjectionGroup) -> tuple[Float[Array, "B T _"], ...]:
        """The adapted outputs."""

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
        """What is added to a sublayer's output."""

        def one(params: PyTree, x: Array) -> Array | None:
            added = self.method.branch(params, sublayer, x[None])
            return None if added is None else added[0]

        return jax.vmap(one)(params, x)


@dataclass(frozen=True)
class OneHot(Rows):
    """Methods of low-rank pairs: one product with the matrices of all slots."""

    def adapt(self, params: Slots, group: ProjectionGroup) -> tuple[Float[Array, "B T _"], ...]:
        """The adapted outputs."""
        pairs, weights = self.method.pairs_of(params.bank, group)
        slots, _, rank, _ = pairs.b.shape
        u = jnp.einsum("BTD,SDU->BTSU", group.x, pairs.a)
        u = u.reshape(*u.shape[:3], len(pairs.tiles), rank)
        mine = jax.nn.one_hot(params.tenant, slots, dtype=u.dtype)[:, None, :, None, None]
        u = u * mine
        if weights is not None:
            u = u * weights[:, :, None].astype(u.dtype)
        by_tile = jnp.repeat(u, jnp.array(pairs.tiles), axis=3, total_repeat_length=sum(pairs.tiles))
        wide = jnp.einsum("BTSMR,SMRO->MBTO", by_tile, pairs.b)
        return add(group.outputs, by_module(pairs.tiles, wide))


@dataclass(frozen=True)
class Kernel(Rows):
    """Methods of low-rank pairs: a kernel that leaves out what a row did not choose.

    Attributes:
      platform: the one of ``adapters.kernel.row_products``.
    """

    platform: str = ""

    def adapt(self, params: Slots, group: ProjectionGroup) -> tuple[Float[Array, "B T _"], ...]:
        """The adapted outputs of one token per row."""
        pairs, weights = self.method.pairs_of(params.bank, group)
        rows, modules = group.x.shape[0], len(pairs.tiles)
        if weights is None:
            shares = jnp.ones((rows, modules), jnp.float32)
        else:
            shares = weights.astype(jnp.float32).reshape(rows, modules)
        wide = row_products(group.x[:, 0], pairs, params.tenant, shares, self.platform)
        return add(group.outputs, by_module(pairs.tiles, wide[:, :, None]))
