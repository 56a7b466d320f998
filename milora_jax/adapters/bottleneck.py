"""Bottlenecks: a narrow pair of matrices around an activation, beside a sublayer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from milora_jax.adapters.protocol import SUBLAYERS, Shape
from milora_jax.adapters.rational import GELU_DENOMINATOR, GELU_NUMERATOR
from milora_jax.shapes import Array, Float, Key


@struct.dataclass
class Bottleneck:
    """One bottleneck per layer, without biases.

    Attributes:
      reduce: into the bottleneck.
      expand: out of it.
      numerator, denominator: coefficients of a rational activation; None with a fixed one.
    """

    reduce: Float[Array, "*L D W"]
    expand: Float[Array, "*L W D"]
    numerator: Float[Array, "*L 7"] | None
    denominator: Float[Array, "*L 5"] | None


def init_bottleneck(
    key: Key[Array, ""], layers: int, size: int, width: int, learned: bool, zero: bool
) -> Bottleneck:
    """Matrices uniform in +-1/sqrt(their input width), the second one zero if ``zero``."""
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
    """A bottleneck beside each sublayer that adds nothing yet."""
    keys = jax.random.split(key, len(SUBLAYERS))
    return {
        name: init_bottleneck(branch_key, shape.num_layers, shape.hidden_size, width, learned, zero=True)
        for branch_key, name in zip(keys, SUBLAYERS, strict=True)
    }


def gelu_coefficients(layers: int) -> tuple[Float[Array, "L 7"], Float[Array, "L 5"]]:
    """Coefficients of the rational fit to GELU, once per layer."""
    return (
        jnp.tile(jnp.array([GELU_NUMERATOR], jnp.float32), (layers, 1)),
        jnp.tile(jnp.array([GELU_DENOMINATOR], jnp.float32), (layers, 1)),
    )
