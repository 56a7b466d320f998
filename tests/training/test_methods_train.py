"""Every method trains, checkpoints, resumes and is loaded again through the same code."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from milora_jax.base.modules import decode_layout
from milora_jax.config import METHODS, AdapterSection, Config, DataSection, ModelSection, TrainSection
from milora_jax.errors import Preempted
from milora_jax.generation.text import generate
from milora_jax.parallel.rules import base_shardings
from milora_jax.storage.adapters import best_metadata, load_adapter
from milora_jax.training.loop import Trainer, planned_steps
from milora_jax.training.prepare import prepare_run
from milora_jax.training.step import make_steps
from tests.models import SMALL, WITH_TOKENIZER, write_hf_directory

SHALLOW = dataclasses.replace(WITH_TOKENIZER, num_layers=2)
STEPS, STOP = 6, 3


def silent(line):
    pass


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A run on a small base, and the programs that all methods' runs share."""
    folder = tmp_path_factory.mktemp("inputs")
    write_hf_directory(folder / "model", SHALLOW)
    rows = [{"instruction": f"say {i}", "input": "", "output": f"{i} {i}"} for i in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = TrainSection(
        max_steps=STEPS,
        epochs=30,
        batch_size=8,
        learning_rate=1e-2,
        eval_every=2,
        save_every=100,
        coefficient_every=2,
    )
    config = Config(
        model=ModelSection(path=str(folder / "model")),
        data=DataSection(train=str(folder / "rows.jsonl"), dev_share=0.2, max_length=360, pack=True),
        train=settings,
    )
    run = prepare_run(config, folder / "none", silent)
    assert run.prompts > 1, "no row is packed"
    one = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), run.mesh.axis_names)  # compiles faster than 8
    base = jax.device_put(run.base, base_shardings(one, run.rules, run.base))
    run = dataclasses.replace(run, mesh=one, base=base)
    return run, make_steps(run.model, settings, planned_steps(settings, len(run.train)), run.prompts)


def fit(run, steps, workdir, stop_after=None):
    reached = []
    workdir.mkdir(exist_ok=True)
    trainer = Trainer(run, workdir, silent, steps)
    return trainer.fit(lambda done, status: reached.append(done), lambda: len(reached) + 1 == stop_after)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_undisturbed_one_and_its_adapter_generates(method, prepared, tmp_path):
    run, steps = prepared
    settings = AdapterSection(method=method, **SMALL[method])
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, adapter=settings))
    whole = fit(run, steps, tmp_path / "whole")
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
