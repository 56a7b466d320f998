"""Routing parity: it is found where it holds, and missed where it does not."""

import dataclasses

import numpy as np
import pytest

from milora_jax.doctor import routes
from milora_jax.doctor.routes import Routes, carried_finding, parity_finding
from tests.doctor.runs import bad, config_of, looked_at, write_inputs

pytest.importorskip("transformers", reason="the doctor looks at tokenizers")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def some_routes(seed=0):
    logits = np.random.default_rng(seed).normal(size=(3, 5, 7))
    probs = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).astype(np.float32)
    chosen = probs >= np.sort(probs, axis=-1)[..., -3:-2]
    return Routes(probs, chosen.astype(np.float32))


def test_routes_that_differ_are_told():
    one = some_routes()
    assert parity_finding(one, one, 1e-5, "5 rows").level == "ok"
    near = dataclasses.replace(one, probs=one.probs + np.float32(1e-3))
    assert parity_finding(one, near, 2e-2, "5 rows").level == "ok"
    assert parity_finding(one, near, 1e-5, "5 rows").level == "fail"
    broken = dataclasses.replace(one, probs=one.probs * np.nan)
    assert parity_finding(one, broken, 2e-2, "5 rows").level == "fail"
    other = dataclasses.replace(one, weights=np.roll(one.weights, 1, axis=-1))
    found = parity_finding(one, other, 1e-5, "5 rows")
    assert found.level == "fail"
    assert "of 15 choices of experts" in found.text


def test_a_tie_is_no_failure():
    """Nor is what follows from one in later layers."""
    probs = np.full((2, 1, 7), 0.1, np.float32)
    probs[..., :2] = 0.25
    one, other, later = np.zeros_like(probs), np.zeros_like(probs), probs.copy()
    one[..., :3], other[..., [0, 1, 5]] = 1, 1
    later[1] = later[1, :, ::-1]
    found = parity_finding(Routes(probs, one), Routes(later, other), 1e-5, "1 row")
    assert (found.level, found.text.endswith("2 of 2 choices are ties")) == ("warn", True)
    swapped = Routes(later[::-1], other)
    assert parity_finding(Routes(probs, one), swapped, 1e-5, "1 row").level == "fail", "before any tie"


def test_a_route_that_decoding_changes_is_told():
    weights = some_routes().weights
    changed = weights.copy()
    changed[1, 2] += 1e-7
    assert carried_finding(weights, weights).level == "ok"
    assert "changed the route of 1 rows" in carried_finding(weights, changed).text


@pytest.mark.thorough
@pytest.mark.parametrize("pack", [False, True])
def test_a_fresh_adapter_routes_alike_in_both(inputs, pack):
    found = looked_at("routing", config_of(inputs, pack=pack), after=["rows", "tokens"])
    assert bad(found) == []
    assert "8 rows, a fresh adapter" in found[0].text


@pytest.mark.thorough
def test_a_prompt_that_prefill_is_not_given_whole_is_found(inputs, monkeypatch):
    whole = routes.collate_prompts

    def cut(prompts, *more):
        return whole([ids[:-1] for ids in prompts], *more)

    monkeypatch.setattr(routes, "collate_prompts", cut)
    found = looked_at("routing", config_of(inputs), after=["rows", "tokens"])
    assert [f.level for f in found] == ["fail", "ok"]


def test_a_method_without_a_router_has_nothing_to_compare(inputs):
    config = config_of(inputs)
    lora = dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, method="lora"))
    (found,) = looked_at("routing", lora)
    assert found.text == "method lora has no router"
