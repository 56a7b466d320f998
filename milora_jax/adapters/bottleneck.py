"""Bottlenecks: a narrow pair of matrices around an activation, beside a sublayer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct

from milora_jax.adapters.hooks import LeafRole
from milora_jax.adapters.inputs import SUBLAYERS, Shape
from milora_jax.adapters.protocol import Method, WidthMethod
from milora_jax.adapters.rational import gelu_coefficients, rational
from milora_jax.config import COEFFICIENTS
from milora_jax.errors import one_of
from milora_jax.shapes import Array, Float, Key


@struct.dataclass
class Bottleneck:
    """One bottleneck per layer, without biases.

    Attributes:
      reduce: matrix into the bottleneck.
      expand: matrix out of the bottleneck.
      numerator, denominator: coefficients of a rational activation; None with a fixed activation.
    """

    reduce: Float[Array, "*L D W"]
    expand: Float[Array, "*L W D"]
    numerator: Float[Array, "*L 7"] | None
    denominator: Float[Array, "*L 5"] | None

    def activate(self, x: Float[Array, "*B W"]) -> Float[Array, "*B W"]:
        """The rational activation of one layer, in float32."""
        if self.numerator is None or self.denominator is None:
            raise ValueError("this bottleneck has no coefficients")
        return rational(x, self.numerator, self.denominator)


def init_bottleneck(
    key: Key[Array, ""], layers: int, size: int, width: int, learned: bool, zero: bool
) -> Bottleneck:
    """Draw matrices uniform in +-1/sqrt(input width); the second one is zero if ``zero``."""
    reduce_key, expand_key = jax.random.split(key)
    bound, wide = size**-0.5, width**-0.5
    if zero:
        expand = jnp.zeros((layers, width, size), jnp.float32)
    else:
        expand = jax.random.uniform(expand_key, (layers, width, size), jnp.float32, -wide, wide)
    numerator, denominator = gelu_coefficients(layers) if learned else (None, None)
    return Bottleneck(
        reduce=jax.random.uniform(reduce_key, (layers, size, width), jnp.float32, -bound, bound),
        expand=expand,
        numerator=numerator,
        denominator=denominator,
    )


def init_branches(key: Key[Array, ""], shape: Shape, width: int, learned: bool) -> dict[str, Bottleneck]:
    """Make a bottleneck beside each sublayer that adds nothing yet."""
    keys = jax.random.split(key, len(SUBLAYERS))
    return {
        name: init_bottleneck(branch_key, shape.num_layers, shape.hidden_size, width, learned, zero=True)
        for branch_key, name in zip(keys, SUBLAYERS, strict=True)
    }


@dataclass(frozen=True)
class RationalMethod(WidthMethod):
    """Settings of bottlenecks with rational activations.

    Attributes:
      coefficients: how the rational coefficients are trained (MiLoRA paper, Appendix A).
    """

    coefficients: str = "bilevel"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("adapter.coefficients", self.coefficients, COEFFICIENTS)

    def served(self) -> Method:
        """The method without the setting of how its coefficients were trained."""
        return dataclasses.replace(self, coefficients=type(self)().coefficients)

    @property
    def theta(self) -> str:
        """How the rational coefficients, which are Theta, are trained."""
        return self.coefficients

    def role(self, path: tuple[str, ...]) -> LeafRole:
        """The role of a leaf: the rational coefficients are Theta."""
        return LeafRole(coefficient=path[-1] in ("numerator", "denominator"))
