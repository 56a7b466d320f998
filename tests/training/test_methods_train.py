"""Every method trains, checkpoints, resumes and is loaded again through the same code."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from milora_jax.adapters.registry import METHODS
from milora_jax.base.modules import decode_layout
from milora_jax.config import AdapterSection
from milora_jax.errors import Preempted
from milora_jax.generation.text import generate
from milora_jax.storage.adapters import best_metadata, load_adapter
from milora_jax.training.loop import Trainer
from tests.models import SMALL
from tests.training.short_runs import STEPS, STOP, fit


@pytest.mark.thorough
@pytest.mark.parametrize(
    "method", ["milora", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS[1:])]
)
def test_a_resumed_run_is_the_undisturbed_one_and_its_adapter_generates(method, prepared, tmp_path):
    run, steps = prepared
    settings = AdapterSection(method=method, **SMALL[method])
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, adapter=settings))
    whole = fit(run, steps, tmp_path / "whole")
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["tokens_per_second"] for line in lines if "loss" in line]
    assert 1 <= len(speeds) <= STEPS
    assert all(speed > 0 for speed in speeds)
    with pytest.raises(Preempted, match=f"saved step {STOP}"):
        fit(run, steps, tmp_path / "parts", stop_after=STOP)
    resumed = fit(run, steps, tmp_path / "parts")
    assert resumed.steps == whole.steps == STEPS
    for one, other in zip(jax.tree.leaves(whole.state), jax.tree.leaves(resumed.state), strict=True):
        if jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        np.testing.assert_array_equal(one, other)

    adapter = load_adapter(tmp_path / "parts")
    assert adapter.method == whole.state.adapter.method
    stored = best_metadata(tmp_path / "parts")["adapter"]
    assert all(stored[name] is not None for name in vars(adapter.method)), "a default may change later"
    answers = generate(
        decode_layout(run.base), run.model, run.tokenizer, ["say 3"], adapter=adapter, max_new_tokens=4
    )
    assert len(answers[0].tokens) >= 1
    assert (answers[0].route is None) == (not adapter.method.routes)


@pytest.mark.thorough
def test_the_health_of_the_routes_is_logged_and_survives_a_resume(prepared, tmp_path):
    run, steps = prepared
    run = dataclasses.replace(
        run, config=dataclasses.replace(run.config, adapter=AdapterSection(rank=4, top_k=2))
    )
    with pytest.raises(Preempted):
        fit(run, steps, tmp_path, stop_after=STOP)
    fit(run, steps, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    seen = [line for line in lines if "route_entropy" in line]
    assert [line["step"] for line in seen] == [2, 4, 6]
    assert seen[0]["route_changed"] is None
    assert all(0 <= line["route_changed"] <= 1 for line in seen[1:])
    for line in seen:
        assert np.shape(line["expert_share"]) == np.shape(line["expert_first"]) == (2, 7)
        np.testing.assert_allclose(np.sum(line["expert_share"], axis=1), 2, atol=1e-3)
        np.testing.assert_allclose(np.sum(line["expert_first"], axis=1), 1, atol=1e-3)
        assert all(0 < entropy <= np.log(7) + 1e-4 for entropy in line["route_entropy"])
        assert all(margin >= 0 for margin in line["route_margin"])


@pytest.mark.thorough
def test_the_next_rows_are_placed_before_anything_waits(prepared, tmp_path, monkeypatch):
    """While the devices take a step; after it they would wait for the host."""
    run, steps = prepared
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, adapter=AdapterSection(rank=4)))
    events = []
    place, look, log = type(run).place, Trainer._count_bad, Trainer._log_step
    monkeypatch.setattr(type(run), "place", lambda *a: (events.append("place"), place(*a))[1])
    monkeypatch.setattr(Trainer, "_count_bad", lambda *a: (events.append("wait"), look(*a))[1])
    monkeypatch.setattr(Trainer, "_log_step", lambda *a: (events.append("wait"), log(*a))[1])
    monkeypatch.setattr(Trainer, "_evaluate", lambda *a: "")
    stepping = dataclasses.replace(steps, train=lambda *a: (events.append("step"), steps.train(*a))[1])
    fit(run, stepping, tmp_path)
    assert events.count("step") == STEPS
    for here, event in enumerate(events):
        if event == "step":
            assert events[here - 1] != "step", "its rows were not placed"
            assert events[here + 1] == "place", "the next rows wait for this step"
