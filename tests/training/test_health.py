"""What a dev evaluation says about the routes."""

import numpy as np
import pytest

from milora_jax.training.health import pack_routes, routing_health, unpack_routes


def routes(probs, top_k):
    order = np.argsort(-probs, axis=-1)[..., :top_k]
    return np.eye(7, dtype=bool)[order].any(axis=-2)


def uneven(layers=2, prompts=50, seed=0):
    logits = np.random.default_rng(seed).normal(size=(layers, prompts, 7))
    return np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)


def test_even_routes():
    probs = np.full((3, 4, 7), 1 / 7)
    health = routing_health(probs, routes(probs, 3), None)
    np.testing.assert_allclose(health.entropy, np.log(7))
    np.testing.assert_allclose(health.margin, 0)
    assert health.changed is None


def test_numbers_by_hand():
    probs = np.array([[[0.4, 0.3, 0.1, 0.1, 0.05, 0.03, 0.02], [0.1, 0.5, 0.2, 0.1, 0.05, 0.03, 0.02]]])
    health = routing_health(probs, routes(probs, 2), None)
    np.testing.assert_allclose(health.share[0], [0.5, 1.0, 0.5, 0, 0, 0, 0])
    np.testing.assert_allclose(health.first[0], [0.5, 0.5, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(health.margin[0], np.mean([0.3 - 0.1, 0.2 - 0.1]))
    np.testing.assert_allclose(health.entropy[0], np.mean(-(probs * np.log(probs)).sum(-1)))


def test_with_all_experts_there_is_no_margin():
    probs = uneven()
    assert routing_health(probs, routes(probs, 7), None).margin is None


def test_changed_counts_layers_and_prompts_whose_set_differs():
    probs = uneven()
    before = routes(probs, 3)
    after = before.copy()
    after[0, 4] = routes(1 - probs, 3)[0, 4]
    assert routing_health(probs, before, before).changed == 0
    assert routing_health(probs, after, before).changed == pytest.approx(1 / 100)
    assert routing_health(probs, before, before[:, :-1]).changed is None, "other dev rows are no change"


def test_a_takeover_is_named():
    probs = uneven()
    assert routing_health(probs, routes(probs, 3), None).warning() is None
    taken = 0.1 * probs
    taken[..., 4] += 0.9
    warning = routing_health(taken, routes(taken, 3), None).warning()
    assert warning == (
        "routing: expert gate is the first choice in 100% of all layers and dev prompts (balanced: 14%); "
        "a larger adapter.load_balance spreads the choice"
    )


def test_a_layer_whose_router_says_one_thing_only_is_named():
    probs = 0.05 * uneven(layers=3)
    probs[1, :, 0] += 0.95
    probs[2] += 0.95 / 7
    probs[0] += 0.95 / 7
    warning = routing_health(probs, routes(probs, 3), None).warning()
    assert "one expert holds 90% or more of the probability: q in layer 1;" in warning


def test_packed_routes_come_back():
    chosen = routes(uneven(5, 33), 3)
    np.testing.assert_array_equal(unpack_routes(pack_routes(chosen)), chosen)
    assert isinstance(pack_routes(chosen), str)
