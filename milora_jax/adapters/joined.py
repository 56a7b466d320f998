"""Low-rank pairs in the form that decoding reads: the pairs of a projection group side by side.

A matrix product of one token takes less time than its launch, so a layer's seven pairs are joined into eight
products instead of fourteen: per group one with all A matrices side by side, and one batched over equal tiles
of the B matrices. The method's scale is multiplied into B.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from milora_jax.adapters.inputs import FrozenLayer
from milora_jax.adapters.low_rank import Pair
from milora_jax.adapters.records import LowRank
from milora_jax.shapes import Array, Float
from milora_jax.types import EXPERTS, GROUPS


@struct.dataclass
class JoinedPairs:
    """The pairs of the M modules of one projection group.

    Attributes:
      a: the A matrices side by side, module by module.
      b: the B matrices, cut along their outputs into tiles of one width: with grouped-query attention
        q is several times as wide as k and v.
      tiles: how many tiles each module has.
      experts: N, the number of experts that share the rank of a module's pair evenly, side by side.
    """

    a: Float[Array, "*S d_in MR"]
    b: Float[Array, "*S tiles R width"]
    tiles: tuple[int, ...] = struct.field(pytree_node=False)
    experts: int = struct.field(pytree_node=False, default=1)

    @property
    def rank(self) -> int:
        """R, the rank of every pair."""
        return self.b.shape[-2]

    def padded(self, rank: int) -> JoinedPairs:
        """Pad the pairs with zeros to a higher rank.

        Args:
          rank: a multiple of the number of experts, which share the new columns and rows evenly.
        """
        each = self.rank // self.experts
        more = rank // self.experts - each
        a = self.a.reshape(*self.a.shape[:-1], len(self.tiles) * self.experts, each)
        a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, more)]).reshape(*self.a.shape[:-1], -1)
        b = self.b.reshape(*self.b.shape[:-2], self.experts, each, self.b.shape[-1])
        b = jnp.pad(b, [(0, 0)] * (b.ndim - 2) + [(0, more), (0, 0)])
        b = b.reshape(*self.b.shape[:-2], rank, self.b.shape[-1])
        return dataclasses.replace(self, a=a, b=b)

    def narrow(self, x: Float[Array, "B T d_in"]) -> Float[Array, "B T M R"]:
        """``x A`` of every module."""
        return (x @ self.a).reshape(*x.shape[:-1], len(self.tiles), self.rank)

    def widen(self, u: Float[Array, "B T M R"]) -> tuple[Float[Array, "B T _"], ...]:
        """``u_i B_i`` of every module."""
        rows, length, _, rank = u.shape
        narrow = u.transpose(2, 0, 1, 3).reshape(-1, rows * length, rank)
        by_tile = jnp.concatenate(
            [jnp.broadcast_to(narrow[i], (n, *narrow.shape[1:])) for i, n in enumerate(self.tiles)]
        )
        wide = jnp.einsum("MBR,MRO->MBO", by_tile, self.b).reshape(-1, rows, length, self.b.shape[-1])
        return by_module(self.tiles, wide)


def by_module(
    tiles: tuple[int, ...], wide: Float[Array, "tiles B T width"]
) -> tuple[Float[Array, "B T _"], ...]:
    """Split tiles of outputs by module."""
    ends = list(accumulate(tiles))
    return tuple(
        wide[start] if end - start == 1 else jnp.concatenate(list(wide[start:end]), axis=-1)
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    )


@struct.dataclass
class Joined:
    """The joined pairs of one layer, by place in ``types.GROUPS``."""

    groups: tuple[Any, ...]

    def of(self, names: tuple[str, ...]) -> Any:
        """The pairs of the group with these modules: JoinedPairs, or the form that a bank gives them."""
        return self.groups[GROUPS.index(names)]

    def changes(
        self,
        names: tuple[str, ...],
        x: Float[Array, "B T d_in"],
        weights: Float[Array, "B _ M _"] | None = None,
    ) -> tuple[Float[Array, "B T _"], ...]:
        """The outputs that the pairs of a group add.

        Args:
          weights: factors of the R-wide products, one number per module or per R.
        """
        pairs = self.of(names)
        u = pairs.narrow(x)
        return pairs.widen(u if weights is None else u * weights.astype(u.dtype))


def filled(pairs: Mapping[str, Pair], frozen: FrozenLayer) -> Mapping[str, Pair]:
    """One layer's pairs with pairs of zeros on the modules that have none.

    So all adapters of a method are decoded by one program, and share a bank, whatever modules they change.

    Args:
      frozen: the layer's frozen leaves, of which only the shapes are read.
    """
    if len(pairs) == len(EXPERTS):
        return pairs
    found = next(iter(pairs.values()))
    rank, dtype = found.a.shape[-1], found.a.dtype
    whole = dict(pairs)
    for place, names in enumerate(GROUPS):
        if all(name in pairs for name in names):
            continue
        leaves = jax.eval_shape(functools.partial(frozen, place))
        for name, (d_in, d_out) in zip(names, (leaf.kernel.shape for leaf in leaves), strict=True):
            if name not in pairs:
                whole[name] = LowRank(jnp.zeros((d_in, rank), dtype), jnp.zeros((rank, d_out), dtype))
    return whole


def join(pairs: Mapping[str, Pair], scale: float, dtype: jnp.dtype, experts: int = 1) -> Joined:
    """Join one layer's pairs.

    Args:
      scale: factor of their products.
      experts: number of experts that share the rank of every pair evenly.
    """
    groups = []
    for names in GROUPS:
        mine = [pairs[name] for name in names]
        width = math.gcd(*(pair.b.shape[-1] for pair in mine))
        counts = tuple(pair.b.shape[-1] // width for pair in mine)
        tiles = [
            jnp.stack(jnp.split(pair.b * scale, n, axis=-1)) for pair, n in zip(mine, counts, strict=True)
        ]
        groups.append(
            JoinedPairs(
                a=jnp.concatenate([pair.a for pair in mine], axis=-1).astype(dtype),
                b=jnp.concatenate(tiles).astype(dtype),
                tiles=counts,
                experts=experts,
            )
        )
    return Joined(tuple(groups))
