"""Rational (Pade) activations: the router's learnable activation (paper, Eq. 6)."""

from __future__ import annotations

import jax.numpy as jnp

from milora_jax.shapes import Array, Float

GELU_NUMERATOR = (2.80386915e-05, 0.5, 0.398502039, 0.162301468, 0.0640523228, 0.0183168727, 0.00210048727)
GELU_DENOMINATOR = (0.0, 0.324602936, 0.0, 0.0366337453, 0.0)
"""Least-squares fit of order 6/5 to the exact GELU on [-3, 3]: largest error there 1.2e-4.

GELU is x/2 plus an even function, which fixes a1 = 1/2, a3 = b2/2, a5 = b4/2 and b1 = b3 = b5 = 0.
Far outside the range the fit is not GELU (12.0 at 10, 2.0 at -10, and it grows like x^2), so the router
normalises its features, see ``milora_jax.adapters.router``.
"""


def gelu_coefficients(layers: int) -> tuple[Float[Array, "L 7"], Float[Array, "L 5"]]:
    """Numerator and denominator of the fit to GELU, once per layer."""
    numerator, denominator = (jnp.array([c], jnp.float32) for c in (GELU_NUMERATOR, GELU_DENOMINATOR))
    return jnp.tile(numerator, (layers, 1)), jnp.tile(denominator, (layers, 1))


def rational(
    x: Float[Array, "*shape"], numerator: Float[Array, " 7"], denominator: Float[Array, " 5"]
) -> Float[Array, "*shape"]:
    """``sum_j a_j x^j / (1 + |sum_i b_i x^i|)``, j = 0..6, i = 1..5, elementwise in float32 (Eq. 6).

    Args:
      x: any shape; computed in float32 because x^6 of a bfloat16 keeps no digit.
      numerator: a_0 .. a_6.
      denominator: b_1 .. b_5.
    """
    x = x.astype(jnp.float32)
    top = jnp.zeros_like(x)
    for j in range(6, -1, -1):
        top = top * x + numerator[j]
    bottom = jnp.zeros_like(x)
    for i in range(4, -1, -1):
        bottom = (bottom + denominator[i]) * x
    return top / (1.0 + jnp.abs(bottom))
