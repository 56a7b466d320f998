"""Poolers, gates, top-k and the load-balance loss (section 3 of the paper)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.adapters.inputs import LayerInput
from milora_jax.adapters.router import (
    Router,
    activate,
    chosen_experts,
    expert_share,
    expert_weights,
    followed,
    load_balance,
    pool,
)
from milora_jax.config import ACTIVATIONS, GATES, POOLERS
from milora_jax.types import Route

RNG = np.random.default_rng(0)
HIDDEN = jnp.asarray(RNG.normal(size=(2, 6, 4)), jnp.float32)
MEMBERS = jnp.array([[[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0]], [[0, 1, 1, 1, 1, 0], [0] * 6]], bool)
WEIGHT = jnp.asarray(RNG.normal(size=4), jnp.float32)
PROBS = jax.nn.softmax(jnp.asarray(RNG.normal(size=(5, 7)), jnp.float32))


@pytest.mark.parametrize("pooler", POOLERS)
def test_poolers_against_numpy(pooler):
    pooled, largest = pool(HIDDEN, MEMBERS, pooler, WEIGHT if pooler == "attention" else None)
    found = np.asarray(pooled)
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
        if pooler == "attention":
            np.testing.assert_allclose(largest[row, record], scores.max() / scores.sum(), rtol=1e-5)
    assert (largest is None) == (pooler != "attention")
    assert np.isfinite(found).all(), "a record without prompt tokens must stay finite"


@pytest.mark.parametrize("pooler", POOLERS)
def test_poolers_look_at_no_other_token(pooler):
    weight = WEIGHT if pooler == "attention" else None
    outside = ~MEMBERS[0, 0]
    changed = HIDDEN.at[0].set(jnp.where(outside[:, None], 1e6, HIDDEN[0]))
    before, after = (pool(hidden, MEMBERS, pooler, weight)[0] for hidden in (HIDDEN, changed))
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


@pytest.mark.parametrize("top_k", range(1, 8))
def test_a_traced_k_chooses_as_a_fixed_one(top_k):
    tied = jnp.concatenate([PROBS, jnp.full((1, 7), 1 / 7), jnp.repeat(PROBS[:1, ::2], 2, axis=1)[:, :7]])
    expected = jax.nn.one_hot(jax.lax.top_k(tied, top_k)[1], 7).sum(axis=-2)
    np.testing.assert_array_equal(chosen_experts(tied, top_k), expected)
    np.testing.assert_array_equal(jax.jit(chosen_experts)(tied, jnp.asarray(top_k)), expected)


@pytest.mark.thorough
@pytest.mark.parametrize("gate", GATES)
def test_a_dense_gradient_comes_from_all_experts_and_changes_no_weight(gate):
    """``d weight_i / d p_i`` is 1 for every expert that is not chosen, in place of 0 (DenseMixer)."""

    def weights(probs, dense):
        return expert_weights(probs, 3, gate, dense=dense)

    np.testing.assert_array_equal(weights(PROBS, True), weights(PROBS, False))
    sparse, dense = (jax.jacobian(weights)(PROBS[0], kind) for kind in (False, True))
    unchosen = np.asarray(weights(PROBS[0], False)) == 0
    np.testing.assert_array_equal(sparse[unchosen], 0)
    np.testing.assert_allclose(dense[unchosen], np.eye(7)[unchosen])
    np.testing.assert_array_equal(sparse[~unchosen], dense[~unchosen])


def test_a_bias_moves_the_choice_and_no_weight():
    last = np.asarray(PROBS[0]).argmin()
    bias = jnp.zeros(7).at[last].set(1.0)
    plain, biased = (np.asarray(expert_weights(PROBS[0], 3, "softmax", bias=b)) for b in (None, bias))
    assert plain[last] == 0
    assert biased[last] == PROBS[0, last]
    slope = jax.grad(lambda b: expert_weights(PROBS[0], 3, "softmax", bias=b).sum())(bias)
    np.testing.assert_array_equal(slope, 0)


def routed(values, present):
    """A route with these weights and probabilities of the prompts ``present``, ``[B, Z]``."""
    return Route(values, values, jnp.broadcast_to(present, values.shape[:-1]), seen=None)


def test_load_balance_is_one_when_uniform_and_seven_when_collapsed():
    present = jnp.ones((7, 1), bool)
    spread = jax.nn.one_hot(jnp.arange(7), 7)[None, :, None, :]
    assert float(load_balance(routed(spread, present))) == pytest.approx(1.0)
    collapsed = jnp.tile(jax.nn.one_hot(2, 7), (1, 7, 1, 1))
    assert float(load_balance(routed(collapsed, present))) == pytest.approx(7.0)


def test_load_balance_by_hand_and_without_absent_prompts():
    probs = jnp.asarray(PROBS)[None, :, None, :]
    present = jnp.array([1, 1, 1, 0, 1], bool)[:, None]
    kept = np.asarray(PROBS)[[0, 1, 2, 4]]
    share = np.bincount(kept.argmax(-1), minlength=7) / 4
    expected = 7 * (share * kept.mean(0)).sum()
    assert float(load_balance(routed(probs, present))) == pytest.approx(expected, rel=1e-5)


def test_load_balance_averages_layers():
    probs = jnp.stack([PROBS, PROBS[::-1] ** 2])[:, :, None, :]
    present = jnp.ones((5, 1), bool)
    parts = [float(load_balance(routed(probs[i : i + 1], present))) for i in range(2)]
    assert float(load_balance(routed(probs, present))) == pytest.approx(sum(parts) / 2, rel=1e-6)


def test_expert_share_counts_present_prompts():
    weights = jnp.zeros((1, 3, 1, 7)).at[0, 0, 0, 1].set(1.0).at[0, 1, 0, 1].set(0.5).at[0, 2, 0, 4].set(1.0)
    share = expert_share(routed(weights, jnp.array([1, 1, 0], bool)[:, None]))
    np.testing.assert_allclose(share[0], [0, 1, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_by_depth(activation):
    router = Router(top_k=3, pooler="mean", activation=activation, features="rms", gate="softmax")
    params = jax.tree.map(lambda leaf: leaf[0], router.init(jax.random.key(0), 2, 4))
    x = jnp.array([[[-1.0, -0.3, 0.4, 2.0]]])
    low, high = (activate(x, activation, params, jnp.array(depth)) for depth in (0.0, 0.5))
    kinds = {"relu": jax.nn.relu(x), "gelu": jax.nn.gelu(x, approximate=False)}
    first, *second = activation.split("-")
    first, second = (first, second[0]) if second else (first, first)
    for found, kind in ((low, first), (high, second)):
        np.testing.assert_allclose(found, kinds.get(kind, kinds["gelu"]), atol=2e-4)


def entering(hidden):
    """The input of a layer whose norm has no weights."""
    normed = hidden / jnp.sqrt(jnp.mean(hidden**2, axis=-1, keepdims=True) + 1e-5)
    return LayerInput(hidden, normed, MEMBERS, jnp.array(0.0))


def one_layer(router):
    return jax.tree.map(lambda leaf: leaf[0], router.init(jax.random.key(0), 1, 4))


@pytest.mark.thorough
@pytest.mark.parametrize(("features", "limit"), [("rms", 2.01), ("raw", 6000.0), ("standardized", 3.01)])
def test_features_bound_what_enters_the_activation(features, limit):
    huge = HIDDEN.at[0, 1, 2].set(5000.0)
    router = Router(top_k=3, pooler="mean", activation="rational", features=features, gate="softmax")
    route = router(one_layer(router), entering(huge))
    largest = float(route.seen.largest.max())
    assert largest < limit
    assert (largest > 1000) is (features == "raw")
    assert float(route.seen.largest[1, 1]) == 0, "there is no prompt"
    assert bool(jnp.isfinite(route.probs).all())


@pytest.mark.parametrize("pooler", POOLERS)
def test_standardized_features_by_hand(pooler):
    """Unit root mean square per token, pooled, less the mean, over the deviation, within 3 (section 3.3)."""
    router = Router(top_k=3, pooler=pooler, activation="gelu", features="standardized", gate="softmax")
    params = one_layer(router)
    mean, deviation = jnp.array([0.5, -0.2, 0.0, 0.1]), jnp.array([0.1, 2.0, 1.0, 0.5])
    params = params.replace(mean=mean, deviation=deviation, pool=WEIGHT if pooler == "attention" else None)
    given = entering(HIDDEN)
    route = router(params, given)
    tokens = np.asarray(given.normed)[0][np.asarray(MEMBERS[0, 0])]
    tokens = tokens / np.sqrt((tokens**2).mean(-1, keepdims=True) + 1e-6)
    scores = np.exp(tokens @ np.asarray(WEIGHT) / np.sqrt(4))
    shares = scores / scores.sum()
    pooled = {
        "mean": tokens.mean(0),
        "max": tokens.max(0),
        "last": tokens[-1],
        "attention": shares @ tokens,
    }[pooler]
    z = (pooled - np.asarray(mean)) / np.asarray(deviation)
    x = np.asarray(jax.nn.gelu(jnp.asarray(np.clip(z, -3, 3)), approximate=False))
    np.testing.assert_allclose(route.probs[0, 0], jax.nn.softmax(x @ params.weight), rtol=1e-4)
    np.testing.assert_allclose(route.seen.spread[0, 0], np.sqrt((z**2).mean()), rtol=1e-4)
    np.testing.assert_allclose(route.seen.largest[0, 0], np.abs(np.clip(z, -3, 3)).max(), rtol=1e-4)
    if pooler == "attention":
        np.testing.assert_allclose(route.seen.token_share[0, 0], shares.max(), rtol=1e-4)


def test_a_router_of_zeros_has_a_route():
    """A bank's slot for the base alone: a feature of 0 over a deviation of 0 would be no number."""
    router = Router(top_k=3, pooler="mean", activation="gelu", features="standardized", gate="softmax")
    params = jax.tree.map(jnp.zeros_like, one_layer(router))
    route = router(params, entering(jnp.zeros_like(HIDDEN)))
    assert bool(jnp.isfinite(route.probs).all())
    assert bool(jnp.isfinite(route.weights).all())


def test_running_statistics_come_to_those_of_the_prompts():
    """A step moves them by one part in ``window``, towards the mean and the deviation of its prompts."""
    router = Router(top_k=3, pooler="mean", activation="gelu", features="standardized", gate="softmax")
    params = router.init(jax.random.key(0), 1, 4).replace(mean=jnp.full((1, 4), 5.0))
    values = RNG.normal(size=(64, 1, 4)) * np.array([0.5, 1.0, 2.0, 3.0]) - 1.0

    def step(params):
        seen = (values - np.asarray(params.mean)) / np.asarray(params.deviation)
        moments = jnp.stack([jnp.asarray(seen.mean(0)), jnp.asarray((seen**2).mean(0))], axis=1)
        return followed(params, moments, 20.0)

    once = step(params)
    np.testing.assert_allclose(once.mean, 5.0 + (values.mean(0) - 5.0) / 20.0, rtol=1e-5)
    squares = ((values - np.asarray(once.mean)) ** 2).mean(0)
    np.testing.assert_allclose(once.deviation**2, 0.95 + squares / 20.0, rtol=1e-4)
    for _ in range(400):
        params = step(params)
    np.testing.assert_allclose(params.mean, values.mean(0), rtol=1e-4)
    np.testing.assert_allclose(params.deviation, values.std(0), rtol=1e-3)


def test_no_token_outweighs_the_others_in_a_standardized_pooler():
    """A massive activation, of which the raw pooler reads nothing else, is one token among others."""
    huge = HIDDEN.at[0, 0, 2].set(25_000.0)
    for features, saturated in (("raw", True), ("standardized", False)):
        router = Router(top_k=3, pooler="attention", activation="gelu", features=features, gate="softmax")
        params = one_layer(router).replace(pool=jnp.full(4, 0.0026))
        share = float(router(params, entering(huge)).seen.token_share[0, 0])
        assert (share > 0.99) is saturated
