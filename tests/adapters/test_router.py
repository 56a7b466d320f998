"""Poolers, gates, top-k and the load-balance loss (section 3 of the paper)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.adapters.router import Router, activate, expert_share, expert_weights, load_balance, pool
from milora_jax.config import ACTIVATIONS, GATES, POOLERS

RNG = np.random.default_rng(0)
HIDDEN = jnp.asarray(RNG.normal(size=(2, 6, 4)), jnp.float32)
MEMBERS = jnp.array([[[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0]], [[0, 1, 1, 1, 1, 0], [0] * 6]], bool)
WEIGHT = jnp.asarray(RNG.normal(size=4), jnp.float32)
PROBS = jax.nn.softmax(jnp.asarray(RNG.normal(size=(5, 7)), jnp.float32))


@pytest.mark.parametrize("pooler", POOLERS)
def test_poolers_against_numpy(pooler):
    found = np.asarray(pool(HIDDEN, MEMBERS, pooler, WEIGHT if pooler == "attention" else None))
    assert found.shape == (2, 2, 4)
    for row, record in [(0, 0), (0, 1), (1, 0)]:
        tokens = np.asarray(HIDDEN[row])[np.asarray(MEMBERS[row, record])]
        scores = np.exp(tokens @ np.asarray(WEIGHT))
        expected = {
            "mean": tokens.mean(0),
            "max": tokens.max(0),
            "last": tokens[-1],
            "attention": (scores / scores.sum()) @ tokens,
        }[pooler]
        np.testing.assert_allclose(found[row, record], expected, rtol=1e-5, atol=1e-6)
    assert np.isfinite(found).all(), "a record without prompt tokens must stay finite"


@pytest.mark.parametrize("pooler", POOLERS)
def test_poolers_look_at_no_other_token(pooler):
    weight = WEIGHT if pooler == "attention" else None
    outside = ~MEMBERS[0, 0]
    changed = HIDDEN.at[0].set(jnp.where(outside[:, None], 1e6, HIDDEN[0]))
    before, after = pool(HIDDEN, MEMBERS, pooler, weight), pool(changed, MEMBERS, pooler, weight)
    np.testing.assert_array_equal(before[0, 0], after[0, 0])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("top_k", range(1, 8))
def test_exactly_k_most_probable_experts(gate, top_k):
    weights = np.asarray(expert_weights(PROBS, top_k, gate))
    for row, probs in zip(weights, np.asarray(PROBS), strict=True):
        assert set(np.flatnonzero(row)) == set(np.argsort(probs)[-top_k:])


def test_ties_still_choose_exactly_k():
    assert np.count_nonzero(expert_weights(jnp.full((1, 7), 1 / 7), 3, "softmax")) == 3


def test_gate_values():
    np.testing.assert_array_equal(expert_weights(PROBS, 7, "softmax"), PROBS)
    np.testing.assert_allclose(expert_weights(PROBS, 3, "renormalized").sum(-1), 3.0, rtol=1e-6)
    straight = np.asarray(expert_weights(PROBS, 3, "straight_through"))
    assert set(np.unique(straight)) == {0.0, 1.0}


def test_straight_through_has_the_gradient_of_the_probability():
    def total(logits, gate):
        return (expert_weights(jax.nn.softmax(logits), 3, gate) * jnp.arange(7.0)).sum()

    logits = jnp.linspace(-1.0, 1.0, 7)
    np.testing.assert_allclose(
        jax.grad(total)(logits, "straight_through"), jax.grad(total)(logits, "softmax"), rtol=1e-6
    )


def test_load_balance_is_one_when_uniform_and_seven_when_collapsed():
    present = jnp.ones((7, 1), bool)
    spread = jax.nn.one_hot(jnp.arange(7), 7)[None, :, None, :]
    assert float(load_balance(spread, present)) == pytest.approx(1.0)
    collapsed = jnp.tile(jax.nn.one_hot(2, 7), (1, 7, 1, 1))
    assert float(load_balance(collapsed, present)) == pytest.approx(7.0)


def test_load_balance_by_hand_and_without_absent_prompts():
    probs = jnp.asarray(PROBS)[None, :, None, :]
    present = jnp.array([1, 1, 1, 0, 1], bool)[:, None]
    kept = np.asarray(PROBS)[[0, 1, 2, 4]]
    share = np.bincount(kept.argmax(-1), minlength=7) / 4
    expected = 7 * (share * kept.mean(0)).sum()
    assert float(load_balance(probs, present)) == pytest.approx(expected, rel=1e-5)


def test_load_balance_averages_layers():
    probs = jnp.stack([PROBS, PROBS[::-1] ** 2])[:, :, None, :]
    present = jnp.ones((5, 1), bool)
    parts = [float(load_balance(probs[i : i + 1], present)) for i in range(2)]
    assert float(load_balance(probs, present)) == pytest.approx(sum(parts) / 2, rel=1e-6)


def test_expert_share_counts_present_prompts():
    weights = jnp.zeros((1, 3, 1, 7)).at[0, 0, 0, 1].set(1.0).at[0, 1, 0, 1].set(0.5).at[0, 2, 0, 4].set(1.0)
    share = expert_share(weights, jnp.array([1, 1, 0], bool)[:, None])
    np.testing.assert_allclose(share[0], [0, 1, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_by_depth(activation):
    router = Router(top_k=3, pooler="mean", activation=activation, normalize=True, gate="softmax")
    params = jax.tree.map(lambda leaf: leaf[0], router.init(jax.random.key(0), 2, 4))
    x = jnp.array([[[-1.0, -0.3, 0.4, 2.0]]])
    low, high = (activate(x, activation, params, jnp.array(depth)) for depth in (0.0, 0.5))
    kinds = {"relu": jax.nn.relu(x), "gelu": jax.nn.gelu(x, approximate=False)}
    first, *second = activation.split("-")
    first, second = (first, second[0]) if second else (first, first)
    for found, kind in ((low, first), (high, second)):
        np.testing.assert_allclose(found, kinds.get(kind, kinds["gelu"]), atol=2e-4)


def test_normalisation_bounds_what_enters_the_activation():
    huge = HIDDEN.at[0, 1, 2].set(5000.0)
    for normalize, limit in ((True, 2.01), (False, 6000.0)):
        router = Router(top_k=3, pooler="mean", activation="rational", normalize=normalize, gate="softmax")
        params = jax.tree.map(lambda leaf: leaf[0], router.init(jax.random.key(0), 1, 4))
        route = router(params, huge, MEMBERS, jnp.array(0.0))
        assert float(route.pooled_max) < limit
        assert (float(route.pooled_max) > 1000) is not normalize
        assert bool(jnp.isfinite(route.probs).all())
