"""A bank of tenants' adapters on the device: one slot each, written in place."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from milora_jax.adapters.joined import JoinedPairs
from milora_jax.adapters.protocol import Adapter, Method
from milora_jax.adapters.registry import adapter_shape
from milora_jax.base.modules import Base
from milora_jax.base.transformer import adapter_decode_layout
from milora_jax.errors import UserError, require
from milora_jax.generation.adapter_stack import PATHS, AdapterStack, choose_path, laid_out
from milora_jax.generation.kernel_choice import fastest_kernel
from milora_jax.model_config import ModelConfig
from milora_jax.prompt_format import PromptFormat
from milora_jax.shapes import Array, Int
from milora_jax.types import PyTree


def no_log(line: str) -> None:
    """Log nothing."""


SMALLEST_RANK = 8
"""The smallest rank of a bank."""


def rank_bucket(rank: int, experts: int = 1) -> int:
    """Return the rank of a bank that holds pairs of this rank: a power of two, which GPU kernels need.

    Args:
      experts: number that share a pair's rank evenly; neither it nor the rank need be a power of two then.

    >>> rank_bucket(1), rank_bucket(9), rank_bucket(200), rank_bucket(12, experts=3)
    (8, 16, 256, 18)
    """
    bucket = SMALLEST_RANK
    while bucket < rank:
        bucket *= 2
    return -(-bucket // experts) * experts


def rank_of(base: Base, config: ModelConfig, adapter: Adapter, name: str = "") -> int:
    """Return the rank of an adapter's pairs as decoding reads them, whatever its method calls rank.

    Nothing is computed.

    Args:
      base: in either layout.
      adapter: in the stacked layout.
      name: name of the adapter, for the error.

    Returns:
      The highest rank; 0 for a method that has no pairs.

    Raises:
      UserError: the adapter was made for a base of another shape.
    """
    return max((pairs.rank for pairs in _pairs_of(base, config, adapter, name)), default=0)


class RankError(UserError):
    """An adapter's pairs have a higher rank than those of the bank.

    Attributes:
      rank: rank of the adapter's pairs.
    """

    def __init__(self, name: str, rank: int, most: int) -> None:
        super().__init__(f"adapter {name!r} has pairs of rank {rank}: expected at most {most}")
        self.rank = rank


class Bank:
    """Adapters of one method, stacked slot by slot in the form that decoding reads.

    Loading an adapter writes its slot of a donated buffer: nothing is compiled again, and programs that
    were started before go on with what they had.

    Args:
      base: in either layout.
      like: any adapter of the kind the bank is to hold; its method's settings are the bank's.
      slots: adapters on the device at the same time.
      rank: least rank of the bank's pairs, for adapters of a higher rank than ``like``'s.
      path: one of ``generation.adapter_stack.PATHS``; empty takes what suits bank and machine, which is
        measured where there are kernels to choose from.
      log: receives a line about each kernel that was measured.

    Attributes:
      adapters: the stack that decoding reads.
      rank: rank of the bank's pairs, by ``rank_bucket``; 0 for a method that has no pairs.
      names: slot by tenant's name.
      prompt_formats: how prompts are written for each tenant, by name.
    """

    def __init__(
        self,
        base: Base,
        config: ModelConfig,
        like: Adapter,
        slots: int,
        *,
        rank: int = 0,
        path: str = "",
        log: Callable[[str], None] = no_log,
    ) -> None:
        require(slots >= 1, "slots", slots, "at least 1")
        self._base, self._config = base, config
        pairs = _pairs_of(base, config, like)
        highest = max([rank, *(each.rank for each in pairs)])
        self.rank = rank_bucket(highest, max(each.experts for each in pairs)) if pairs else 0
        method = like.method.served()
        platform = jax.default_backend()

        def fastest() -> str:
            layer, *_ = jax.eval_shape(lambda: self._prepared(like, "gathered"))
            return fastest_kernel(list(filter(_is_pairs, _nodes(layer))), platform, log)

        path = path or choose_path(method, slots, platform, fastest)
        require(path in PATHS and path != "one", "path", path, f"one of {', '.join(PATHS[1:])}")
        self.slots, self.names = slots, dict[str, int]()
        self.prompt_formats: dict[str, PromptFormat] = {}
        one = jax.eval_shape(lambda: self._prepared(like, path))
        empty = jax.tree.map(
            lambda leaf: jnp.zeros((slots, *leaf.shape), leaf.dtype, device=base.everywhere), one
        )
        self.adapters = AdapterStack(params=empty, method=method, shape=like.shape, path=path)

    def load(self, name: str, adapter: Adapter, slot: int | None = None) -> int:
        """Load a tenant's adapter onto the device.

        Args:
          adapter: in the stacked layout.
          slot: the slot to write; None takes the tenant's own, or a free one.

        Returns:
          The slot.

        Raises:
          UserError: for an adapter of another base or method or of too high a rank, or a full bank; the
            bank is unchanged then.
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
        self.prompt_formats[name] = adapter.encoding
        self.names = {other: place for other, place in self.names.items() if place != slot}
        self.names[name] = slot
        return slot

    def prepare(self, name: str, adapter: Adapter) -> PyTree:
        """Return an adapter in the form of a slot, without changing the bank: another thread may call this.

        What is returned can be placed: its leaves have the shapes and dtypes of a slot's.

        Raises:
          UserError: for an adapter of another base or method, or of too high a rank.
        """
        _require_same_method(name, adapter.method, self.adapters.method)
        rank = rank_of(self._base, self._config, adapter, name)
        if rank > self.rank:
            raise RankError(name, rank, self.rank)
        prepared = self._prepared(adapter, self.adapters.path)
        self._require_same_leaves(name, prepared)
        return prepared

    def place(self, prepared: PyTree, slot: int) -> None:
        """Write the result of :meth:`prepare` into a slot."""
        params = _write(self.adapters.params, prepared, jnp.asarray(slot, jnp.int32))
        self.adapters = dataclasses.replace(self.adapters, params=params)

    def slot_of(self, name: str) -> int:
        """Return the slot of a tenant's adapter.

        Raises:
          UserError: it is not in the bank.
        """
        if name not in self.names:
            raise UserError(f"no adapter {name!r} in the bank: expected one of {', '.join(self.names)}")
        return self.names[name]

    def _require_same_leaves(self, name: str, prepared: PyTree) -> None:
        bank = self.adapters.params
        if jax.tree.structure(prepared) != jax.tree.structure(bank):
            raise UserError(f"adapter {name!r} has other parameters than this bank holds")
        for (place, mine), theirs in zip(
            jax.tree_util.tree_leaves_with_path(prepared), jax.tree.leaves(bank), strict=True
        ):
            if (mine.shape, mine.dtype) != (theirs.shape[1:], theirs.dtype):
                raise UserError(
                    f"adapter {name!r}: {jax.tree_util.keystr(place)} is {mine.dtype}{list(mine.shape)}, "
                    f"this bank holds {theirs.dtype}{list(theirs.shape[1:])}"
                )

    def _prepared(self, adapter: Adapter, path: str) -> PyTree:
        """The adapter as its slot holds it."""
        params = adapter_decode_layout(adapter, self._base).params

        def padded(node: PyTree) -> PyTree:
            return node.padded(self.rank) if _is_pairs(node) and self.rank > node.rank else node

        params = jax.tree.map(padded, params, is_leaf=_is_pairs)
        return laid_out(params, path)


def _is_pairs(node: PyTree) -> bool:
    return isinstance(node, JoinedPairs)


def _nodes(params: PyTree) -> list[PyTree]:
    """The pairs, and every leaf outside of them."""
    return jax.tree.leaves(params, is_leaf=_is_pairs)


def _pairs_of(base: Base, config: ModelConfig, adapter: Adapter, name: str = "") -> list[JoinedPairs]:
    """An adapter's pairs as decoding reads them, abstract."""
    shape = adapter_shape(config)
    if adapter.shape != shape:
        said = f"adapter {name!r}" if name else "the adapter"
        raise UserError(f"{said} fits a base of {adapter.shape}, this one has {shape}")
    params = jax.eval_shape(lambda: adapter_decode_layout(adapter, base).params)
    return list(filter(_is_pairs, _nodes(params)))


def _require_same_method(name: str, found: Method, held: Method) -> None:
    """Refuse an adapter that decoding would read otherwise than those of the bank."""
    served = found.served()
    if served.name != held.name:
        raise UserError(f"adapter {name!r} is of method {found.name!r}: this bank holds {held.name!r}")
    settings = [field.name for field in dataclasses.fields(held) if field.name != "rank"]
    for setting in settings:
        mine, theirs = getattr(served, setting), getattr(held, setting)
        if mine != theirs:
            raise UserError(
                f"adapter {name!r} has {setting} {mine!r}: this bank holds adapters with {theirs!r}"
            )


@functools.partial(jax.jit, donate_argnums=0)
def _write(bank: PyTree, params: PyTree, slot: Int[Array, ""]) -> PyTree:
    return jax.tree.map(lambda leaf, new: leaf.at[slot].set(new), bank, params)
