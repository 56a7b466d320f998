"""The rational activation of Eq. 6."""

import jax
import jax.numpy as jnp
import numpy as np

from milora_jax.adapters.rational import GELU_DENOMINATOR, GELU_NUMERATOR, rational

NUMERATOR = jnp.array(GELU_NUMERATOR, jnp.float32)
DENOMINATOR = jnp.array(GELU_DENOMINATOR, jnp.float32)


def test_equals_the_formula_term_by_term():
    rng = np.random.default_rng(0)
    x, a, b = rng.normal(size=(3, 4)), rng.normal(size=7), rng.normal(size=5)
    expected = sum(a[j] * x**j for j in range(7)) / (1 + abs(sum(b[i - 1] * x**i for i in range(1, 6))))
    found = rational(*(jnp.asarray(v, jnp.float32) for v in (x, a, b)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_fits_gelu_where_normalised_values_lie():
    x = jnp.linspace(-3.0, 3.0, 2001)
    error = jnp.abs(rational(x, NUMERATOR, DENOMINATOR) - jax.nn.gelu(x, approximate=False))
    assert float(error.max()) < 1.5e-4


def test_is_no_gelu_far_outside_which_is_why_the_router_normalises():
    assert float(rational(jnp.array(-10.0), NUMERATOR, DENOMINATOR)) > 1.0


def test_computes_in_float32_for_bfloat16_input():
    x = jnp.array([0.5, 2.0, 3.0], jnp.bfloat16)
    found = rational(x, NUMERATOR, DENOMINATOR)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, rational(x.astype(jnp.float32), NUMERATOR, DENOMINATOR))


def test_every_coefficient_gets_a_gradient():
    x = jnp.linspace(-2.0, 2.5, 11)
    gradients = jax.grad(lambda ab: rational(x, *ab).sum())((NUMERATOR, DENOMINATOR))
    assert all(bool((jnp.abs(g) > 0).all()) for g in gradients)
