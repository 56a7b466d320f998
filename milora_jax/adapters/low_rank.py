"""Low-rank pairs ``x A B``: the expert of MiLoRA and the whole of LoRA (paper, Eq. 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from milora_jax.adapters.hooks import LeafRole
from milora_jax.adapters.inputs import Shape
from milora_jax.adapters.protocol import Method
from milora_jax.adapters.records import LowRank
from milora_jax.errors import require
from milora_jax.shapes import Array, Float, Key
from milora_jax.types import EXPERTS, kept


@runtime_checkable
class Pair(Protocol):
    """Anything with the two matrices of a low-rank pair."""

    @property
    def a(self) -> Array:
        """W_A, on the side of the input."""
        ...

    @property
    def b(self) -> Array:
        """W_B, on the side of the output."""
        ...


SMALLEST_ALPHA, LARGEST_ALPHA = 1e-6, 1e9
"""Bounds between which a pair's product is neither zero nor infinite in float32, at any rank."""


@dataclass(frozen=True)
class LowRankMethod(Method):
    """The settings of every method made of low-rank pairs.

    Attributes:
      rank: width R of a pair.
      alpha: numerator of the scale; 0 means scale 1, as in Eq. 1 of the paper.
      use_rslora: divide alpha by the root of the rank, not by the rank (Kalajdzievski 2023,
        arXiv 2312.03732).
      dropout: share of the pairs' input that is dropped in training.
    """

    all_modules: ClassVar[str] = "which has a pair on all seven modules of a layer"
    rank: int = 32
    alpha: float = 0.0
    use_rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require(self.rank >= 1, "adapter.rank", self.rank, "at least 1")
        fits = self.alpha == 0 or SMALLEST_ALPHA <= self.alpha <= LARGEST_ALPHA
        expected = f"0 (alpha = rank), or from {SMALLEST_ALPHA:g} to {LARGEST_ALPHA:g}"
        require(fits, "adapter.alpha", self.alpha, expected)
        stated = self.alpha > 0 or not self.use_rslora
        require(stated, "adapter.alpha", self.alpha, "above 0 with adapter.use_rslora")
        require(0 <= self.dropout < 1, "adapter.dropout", self.dropout, "from 0 to below 1")

    @property
    def scaled_rank(self) -> int:
        """The rank by which alpha is divided: that of a pair while it is trained."""
        return self.rank

    @property
    def scale(self) -> float:
        """The factor of a low-rank product: alpha / rank, or with ``use_rslora`` alpha / sqrt(rank)."""
        if not self.alpha:
            return 1.0
        return self.alpha / (math.sqrt(self.scaled_rank) if self.use_rslora else self.scaled_rank)

    def role(self, path: tuple[str, ...]) -> LeafRole:
        """The role of a leaf: the B of a pair is at the output."""
        return LeafRole(output=path[-1] == "b")

    @property
    def stochastic(self) -> bool:
        """Whether there is dropout, the only random part."""
        return self.dropout > 0


def init_pairs(
    key: Key[Array, ""], shape: Shape, rank: int, modules: Sequence[str] = EXPERTS
) -> dict[str, LowRank]:
    """Make pairs of ``modules``: A uniform in +-1/sqrt(d_in) as PEFT draws it, B zero.

    What a module gets does not depend on the others.
    """
    pairs = {}
    for module_key, (name, (d_in, d_out)) in zip(jax.random.split(key, 7), shape.modules, strict=True):
        if name not in modules:
            continue
        bound = d_in**-0.5
        a = jax.random.uniform(module_key, (shape.num_layers, d_in, rank), jnp.float32, -bound, bound)
        pairs[name] = LowRank(a=a, b=jnp.zeros((shape.num_layers, rank, d_out), jnp.float32))
    return pairs


def pair_sizes(shape: Shape, rank: int) -> dict[str, int]:
    """``L * R * (d_in + d_out)`` per module: the parameters of its pair over all layers."""
    return {name: shape.num_layers * rank * sum(dims) for name, dims in shape.modules}


def drop(x: Float[Array, "*B d_in"], rate: float, key: Key[Array, ""] | None) -> Float[Array, "*B d_in"]:
    """Apply dropout: zero a ``rate`` share of ``x`` and scale the rest up; without a key, return ``x``."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros_like(x))


def narrow(
    pairs: Mapping[str, Pair], names: tuple[str, ...], x: Float[Array, "B T d_in"]
) -> Float[Array, "B T M R"]:
    """``x A`` of the M modules of a group, whose A matrices are joined into one matrix product."""
    rank = pairs[names[0]].a.shape[-1]
    a = jnp.concatenate([pairs[name].a for name in names], axis=-1).astype(x.dtype)
    return kept(x @ a).reshape(*x.shape[:-1], len(names), rank)


def widen(
    pairs: Mapping[str, Pair], names: tuple[str, ...], u: Float[Array, "B T M R"]
) -> tuple[Float[Array, "B T _"], ...]:
    """``u_i B_i`` of every module of a group."""
    return tuple(_product(u[..., i, :], pairs[name].b.astype(u.dtype)) for i, name in enumerate(names))


@jax.custom_vjp
def _product(u: Float[Array, "B T R"], b: Float[Array, "R d_out"]) -> Float[Array, "B T d_out"]:
    """``u B``, with a gradient for B that has the narrow operand on the left.

    JAX puts the wide one there, which XLA for CPUs first copies transposed: a sixth of a training step.
    """
    return u @ b


def _product_forward(u: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return u @ b, (u, b)


def _product_backward(residuals: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    u, b = residuals
    return jnp.einsum("BTO,RO->BTR", slope, b), jnp.einsum("BTR,BTO->RO", u, slope)


_product.defvjp(_product_forward, _product_backward)


def of_group(weights: Float[Array, "B _ E"], names: tuple[str, ...]) -> Float[Array, "B _ M 1"]:
    """The routing weights of a group's modules, in the shape that multiplies :func:`narrow`'s result."""
    return weights[..., [EXPERTS.index(name) for name in names]][..., None]


def add(
    outputs: tuple[Float[Array, "B T _"], ...], changes: tuple[Float[Array, "B T _"], ...]
) -> tuple[Float[Array, "B T _"], ...]:
    """Add changes to outputs, module by module."""
    return tuple(output + change for output, change in zip(outputs, changes, strict=True))
