"""What a dev evaluation says about the routes."""

import numpy as np
import pytest

from milora_jax.config import AdapterSection
from milora_jax.training.health import PromptRoutes, pack_routes, routing_health, unpack_routes

RMS = AdapterSection(features="rms")
SHIPPED = AdapterSection(features="standardized", top_k_anneal=0.4)


def health_of(probs, chosen, before=None, sources=None, token_share=None):
    number = np.ones(probs.shape[:2])
    seen = PromptRoutes(probs, chosen, number, number, token_share)
    return routing_health(seen, before, sources or [""] * probs.shape[1])


def routes(probs, top_k):
    order = np.argsort(-probs, axis=-1)[..., :top_k]
    return np.eye(7, dtype=bool)[order].any(axis=-2)


def uneven(layers=2, prompts=50, seed=0):
    logits = np.random.default_rng(seed).normal(size=(layers, prompts, 7))
    return np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)


def test_even_routes():
    probs = np.full((3, 4, 7), 1 / 7)
    health = health_of(probs, routes(probs, 3))
    np.testing.assert_allclose(health.entropy, np.log(7))
    np.testing.assert_allclose(health.margin, 0)
    assert health.changed is None


def test_numbers_by_hand():
    probs = np.array([[[0.4, 0.3, 0.1, 0.1, 0.05, 0.03, 0.02], [0.1, 0.5, 0.2, 0.1, 0.05, 0.03, 0.02]]])
    health = health_of(probs, routes(probs, 2))
    np.testing.assert_allclose(health.share[0], [0.5, 1.0, 0.5, 0, 0, 0, 0])
    np.testing.assert_allclose(health.first[0], [0.5, 0.5, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(health.margin[0], np.mean([0.3 - 0.1, 0.2 - 0.1]))
    np.testing.assert_allclose(health.entropy[0], np.mean(-(probs * np.log(probs)).sum(-1)))


def test_with_all_experts_there_is_no_margin():
    probs = uneven()
    assert health_of(probs, routes(probs, 7)).margin is None


def test_changed_counts_layers_and_prompts_whose_set_differs():
    probs = uneven()
    before = routes(probs, 3)
    after = before.copy()
    after[0, 4] = routes(1 - probs, 3)[0, 4]
    assert health_of(probs, before, before).changed == 0
    assert health_of(probs, after, before).changed == pytest.approx(1 / 100)
    assert health_of(probs, before, before[:, :-1]).changed is None, "other dev rows are no change"


def test_a_takeover_is_named():
    probs = uneven()
    assert health_of(probs, routes(probs, 3)).warning(RMS) is None
    taken = 0.1 * probs
    taken[..., 4] += 0.9
    warning = health_of(taken, routes(taken, 3)).warning(RMS)
    assert warning == (
        "routing: expert gate is the first choice in 100% of all layers and dev prompts (balanced: 14%); "
        "adapter.features=standardized reads what differs between prompts"
    )


def test_a_layer_whose_router_says_one_thing_only_is_named():
    probs = 0.05 * uneven(layers=3)
    probs[1, :, 0] += 0.95
    probs[2] += 0.95 / 7
    probs[0] += 0.95 / 7
    warning = health_of(probs, routes(probs, 3)).warning(RMS)
    assert "one expert holds 90% or more of the probability: q in layer 1;" in warning


def test_agreement_by_hand():
    """Four prompts of two sources; a pair agrees where the whole sets are equal."""
    sets = np.zeros((2, 4, 7), bool)
    sets[0, :, [0, 1]] = True
    sets[1, :3, 2] = sets[1, 3, 3] = True
    health = health_of(np.full((2, 4, 7), 1 / 7), sets, sources=["a", "a", "b", "b"])
    np.testing.assert_allclose(health.common, [1.0, 0.75])
    np.testing.assert_allclose(health.agree, [1.0, 0.75])
    np.testing.assert_allclose(health.across, [1.0, 0.5])
    assert health_of(np.full((2, 4, 7), 1 / 7), sets).across is None


def test_blind_routers_are_named_and_what_to_do_depends_on_the_settings():
    probs = uneven(layers=5)
    probs[:2] = probs[:2, :1]
    health = health_of(probs, routes(probs, 3))
    said = "routing: 100% of the dev prompts share one route in 2 of 5 layers; "
    assert health.warning(RMS) == said + "adapter.features=standardized reads what differs between prompts"
    assert "train.router_rate" in health.warning(SHIPPED)
    assert "adapter.top_k_anneal" in health.warning(AdapterSection(features="standardized", top_k_anneal=0.0))
    probs = uneven(layers=5)
    probs[:1] = probs[:1, :1]
    assert health_of(probs, routes(probs, 3)).warning(RMS) is None, "one layer of five"


def test_saturated_poolers_are_named():
    probs = uneven(layers=2)
    share = np.array([[0.95] * 50, [0.2] * 50])
    assert "one token has 90% or more of the pooler in 1 of 2 layers" in health_of(
        probs, routes(probs, 3), token_share=share
    ).warning(RMS)


def test_packed_routes_come_back():
    chosen = routes(uneven(5, 33), 3)
    np.testing.assert_array_equal(unpack_routes(pack_routes(chosen)), chosen)
    assert isinstance(pack_routes(chosen), str)
