"""A bank of tenants' adapters on the device: one slot each, written in place."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from milora_jax.adapters.joined import JoinedPairs
from milora_jax.adapters.protocol import Adapter
from milora_jax.adapters.registry import adapter_shape
from milora_jax.adapters.tenants import PATHS, Tenants, choose_path, laid_out
from milora_jax.base.modules import Base
from milora_jax.base.transformer import adapter_decode_layout
from milora_jax.errors import UserError, require
from milora_jax.model_config import ModelConfig
from milora_jax.prompt_format import PromptFormat
from milora_jax.shapes import Array, Int
from milora_jax.types import PyTree

RANKS = (8, 16, 32, 64, 128)
"""Ranks a bank may have; adapters of a lower rank are filled up with zeros."""


def rank_bucket(rank: int) -> int:
    """The smallest rank of a bank that holds pairs of this rank.

    >>> rank_bucket(8), rank_bucket(9), rank_bucket(200)
    (8, 16, 200)
    """
    return next((bucket for bucket in RANKS if bucket >= rank), rank)


class Bank:
    """Adapters of one method, stacked slot by slot in the form that decoding reads.

    Loading an adapter writes its slot of a donated buffer: nothing is compiled again, and programs that
    were started before go on with what they had.

    Args:
      base: in either layout.
      like: any adapter of the kind the bank is to hold; its method's settings are the bank's.
      slots: adapters on the device at the same time.
      rank: of the bank's pairs; 0 takes ``rank_bucket`` of ``like``'s.
      path: one of ``adapters.tenants.PATHS``; empty takes what suits bank and machine.

    Attributes:
      tenants: what decoding reads.
      names: slot by tenant's name.
      prompt_formats: how prompts are written for each tenant, by name.
    """

    def __init__(
        self, base: Base, config: ModelConfig, like: Adapter, slots: int, *, rank: int = 0, path: str = ""
    ) -> None:
        require(slots >= 1, "slots", slots, "at least 1")
        self._base, self._shape = base, adapter_shape(config)
        self._require_fit(like)
        rank = rank or rank_bucket(getattr(like.method, "rank", 0))
        method = like.method.served(rank)
        path = path or choose_path(method, slots, jax.default_backend())
        require(path in PATHS and path != "one", "path", path, f"one of {', '.join(PATHS[1:])}")
        self.slots, self.rank, self.names = slots, rank, dict[str, int]()
        self.prompt_formats: dict[str, PromptFormat] = {}
        one = jax.eval_shape(lambda: self._prepared(like, path))
        empty = jax.tree.map(
            lambda leaf: jnp.zeros((slots, *leaf.shape), leaf.dtype, device=base.everywhere), one
        )
        self.tenants = Tenants(params=empty, method=method, shape=self._shape, path=path)

    def load(self, name: str, adapter: Adapter, slot: int | None = None) -> int:
        """Put a tenant's adapter on the device.

        Args:
          adapter: in the stacked layout.
          slot: to write; None takes the tenant's own, or a free one.

        Returns:
          The slot.

        Raises:
          UserError: for an adapter of another base, method or rank, or a full bank; the bank is
            unchanged then.
        """
        prepared = self.prepare(name, adapter)
        if slot is None:
            slot = self.names.get(name)
        if slot is None:
            free = sorted(set(range(self.slots)) - set(self.names.values()))
            if not free:
                raise UserError(f"no slot is free for adapter {name!r}: the bank's {self.slots} are taken")
            slot = free[0]
        require(0 <= slot < self.slots, "slot", slot, f"0 to {self.slots - 1}")
        self.place(prepared, slot)
        self.prompt_formats[name] = adapter.prompt_format
        self.names = {other: place for other, place in self.names.items() if place != slot}
        self.names[name] = slot
        return slot

    def prepare(self, name: str, adapter: Adapter) -> PyTree:
        """An adapter as a slot holds it, made beside the bank: another thread may do it.

        Raises:
          UserError: for an adapter of another base, method or rank.
        """
        self._require_fit(adapter)
        method = self.tenants.method
        found = adapter.method.served(self.rank)
        if found != method:
            raise UserError(f"adapter {name!r} is {found}: this bank holds {method}")
        rank = getattr(adapter.method, "rank", 0)
        if rank > self.rank:
            raise UserError(f"adapter {name!r} has rank {rank}: expected at most {self.rank}")
        return self._prepared(adapter, self.tenants.path)

    def place(self, prepared: PyTree, slot: int) -> None:
        """Write what :meth:`prepare` made into a slot."""
        params = _write(self.tenants.params, prepared, jnp.asarray(slot, jnp.int32))
        self.tenants = dataclasses.replace(self.tenants, params=params)

    def slot_of(self, name: str) -> int:
        """Where a tenant's adapter is.

        Raises:
          UserError: it is not in the bank.
        """
        if name not in self.names:
            raise UserError(f"no adapter {name!r} in the bank: expected one of {', '.join(self.names)}")
        return self.names[name]

    def _require_fit(self, adapter: Adapter) -> None:
        if adapter.shape != self._shape:
            raise UserError(f"the adapter fits a base of {adapter.shape}, this one has {self._shape}")

    def _prepared(self, adapter: Adapter, path: str) -> PyTree:
        """The adapter as its slot holds it."""
        params = adapter_decode_layout(adapter, self._base).params

        def padded(node: PyTree) -> PyTree:
            return node.padded(self.rank) if isinstance(node, JoinedPairs) and self.rank > node.rank else node

        params = jax.tree.map(padded, params, is_leaf=lambda node: isinstance(node, JoinedPairs))
        return laid_out(params, path)


@functools.partial(jax.jit, donate_argnums=0)
def _write(bank: PyTree, params: PyTree, slot: Int[Array, ""]) -> PyTree:
    return jax.tree.map(lambda leaf, new: leaf.at[slot].set(new), bank, params)
