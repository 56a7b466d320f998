"""MOELoRA as in the MiLoRA paper (Appendix D): experts within a module, chosen token by token.

Every module has N experts, each of rank R / N, and a router of its own that reads the module's input at every
token and keeps the k most probable experts, whose probabilities are scaled to sum to 1. The method that first
had the name (Liu et al. 2023, arXiv 2310.18339) routes by task and keeps all experts; it is not this one.
There is no balance term, because neither paper has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from milora_jax.adapters.hooks import LeafRole
from milora_jax.adapters.inputs import FrozenLayer, Kernels, ProjectionGroup, Shape
from milora_jax.adapters.joined import Joined, join
from milora_jax.adapters.low_rank import LowRankMethod, add, drop, init_pairs, narrow, pair_sizes, widen
from milora_jax.adapters.protocol import Method
from milora_jax.errors import require
from milora_jax.shapes import Array, Float, Key
from milora_jax.types import GROUPS


@struct.dataclass
class RoutedPair:
    """One module's experts, side by side in one pair, and their router.

    Attributes:
      a, b: pairs of the experts; columns ``i R/N`` to ``(i + 1) R/N`` are expert i.
      routing: matrix that scores the N experts by the module's input.
    """

    a: Float[Array, "*L d_in R"]
    b: Float[Array, "*L R d_out"]
    routing: Float[Array, "*L d_in N"]


@struct.dataclass
class JoinedExperts:
    """One layer's experts and routers, joined for decoding.

    Attributes:
      pairs: the experts of all modules.
      routing: the routers of each group's modules, by place in ``types.GROUPS``.
    """

    pairs: Joined
    routing: tuple[Float[Array, "d_in M N"], ...]


@dataclass(frozen=True)
class MOELoRA(LowRankMethod):
    """MOELoRA and its settings.

    Attributes:
      rank: rank of all experts of a module together.
      num_experts: N, a divisor of the rank.
      top_k: experts chosen at a token.
    """

    name: ClassVar[str] = "moelora"
    additive: ClassVar[bool] = True
    num_experts: int = 8
    top_k: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_experts >= 1, "adapter.num_experts", self.num_experts, "at least 1")
        divides = self.rank % self.num_experts == 0
        require(divides, "adapter.rank", self.rank, f"a multiple of num_experts {self.num_experts}")
        fits = 1 <= self.top_k <= self.num_experts
        require(fits, "adapter.top_k", self.top_k, f"1 to num_experts {self.num_experts}")

    def init(self, key: Key[Array, ""], shape: Shape, kernels: Kernels) -> dict[str, RoutedPair]:
        """Make LoRA's pairs, and routers drawn as in MoLA: uniform in +-1/sqrt(d_in)."""
        del kernels
        pairs_key, *keys = jax.random.split(key, 8)
        pairs, params = init_pairs(pairs_key, shape, self.rank), {}
        for module_key, (name, (d_in, _)) in zip(keys, shape.modules, strict=True):
            size, bound = (shape.num_layers, d_in, self.num_experts), d_in**-0.5
            router = jax.random.uniform(module_key, size, jnp.float32, -bound, bound)
            params[name] = RoutedPair(pairs[name].a, pairs[name].b, router)
        return params

    def role(self, path: tuple[str, ...]) -> LeafRole:
        """The role of a leaf; every module has a router."""
        return LeafRole(router=path[-1] == "routing", output=path[-1] == "b")

    def prepare(self, params: dict[str, RoutedPair], frozen: FrozenLayer, dtype: jnp.dtype) -> JoinedExperts:
        """Join the experts, and the routers of each group into one matrix."""
        del frozen
        routing = tuple(_routers(params, names) for names in GROUPS)
        return JoinedExperts(join(params, self.scale, dtype, experts=self.num_experts), routing)

    def served(self) -> Method:
        """The method with its router's settings, at the least rank that every number of experts divides."""
        return MOELoRA(rank=self.num_experts, num_experts=self.num_experts, top_k=self.top_k)

    def adapt(
        self, params: dict[str, RoutedPair] | JoinedExperts, group: ProjectionGroup
    ) -> tuple[Float[Array, "B T _"], ...]:
        """Add every module's chosen experts, weighted token by token; the router reads the whole input."""
        if isinstance(params, JoinedExperts):
            rank = params.pairs.of(group.names).rank
            gates = self._gates(params.routing[GROUPS.index(group.names)], group.x, rank)
            return add(group.outputs, params.pairs.changes(group.names, group.x, gates))
        u = narrow(params, group.names, drop(group.x, self.dropout, group.key)) * self.scale
        gates = self._gates(_routers(params, group.names), group.x, u.shape[-1])
        return add(group.outputs, widen(params, group.names, u * gates.astype(u.dtype)))

    def _gates(
        self, routers: Float[Array, "d_in M N"], x: Float[Array, "B T d_in"], rank: int
    ) -> Float[Array, "B T M R"]:
        """Factor of each column of the products, which are ``rank`` wide, token by token."""
        logits = jnp.einsum("BTD,DMN->BTMN", x.astype(jnp.float32), routers)
        probs = jax.nn.softmax(logits, axis=-1)
        kept, chosen = jax.lax.top_k(probs, self.top_k)
        shares = kept / kept.sum(axis=-1, keepdims=True)
        gates = (jax.nn.one_hot(chosen, self.num_experts) * shares[..., None]).sum(axis=-2)
        return jnp.repeat(gates, rank // self.num_experts, axis=-1)

    def active_parameters(self, shape: Shape, share: Mapping[str, float], tunable: int) -> float:
        """Parameters of k of N experts, and of all routers, which run at every token."""
        del share
        pairs = sum(pair_sizes(shape, self.rank).values())
        routers = tunable - pairs
        return pairs * self.top_k / self.num_experts + routers


def _routers(params: dict[str, RoutedPair], names: tuple[str, ...]) -> Float[Array, "d_in M N"]:
    """The routers of a group's modules side by side."""
    return jnp.stack([params[name].routing for name in names], axis=-2)
