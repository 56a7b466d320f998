"""Standardized features: measured once, on prompts alone, and the same everywhere."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from milora_jax.adapters.registry import build_method
from milora_jax.adapters.router import FLOOR, LEAST
from milora_jax.base.attention import attention
from milora_jax.config import AdapterSection
from milora_jax.errors import Preempted, UserError
from milora_jax.storage.adapters import load_adapter
from milora_jax.training.calibration import feature_program, feature_statistics
from tests.models import random_base
from tests.training.short_runs import STEPS, STOP, fit
from tests.training.steps import MODEL, rows

STANDARDIZED = AdapterSection(method="milora", rank=4, features="standardized")


def batches_of(values, size):
    """Batches of prompts that each hold one row of ``values``, ``[N, L, D]``."""
    for start in range(0, len(values), size):
        part = values[start : start + size]
        padding = np.zeros((size - len(part), *values.shape[1:]), np.float32)
        whole = np.concatenate([part, padding])
        yield whole.swapaxes(0, 1)[:, :, None], (np.arange(size) < len(part))[:, None]


def measured(values, size, prompts=10_000):
    return feature_statistics(lambda batch: batch, batches_of(values, size), prompts)


def test_mean_and_deviation_by_numpy_whatever_the_batches():
    values = (np.random.default_rng(0).normal(size=(37, 2, 6)) * 2 + 300).astype(np.float32)
    for size in (1, 5, 64):
        found = measured(values, size)
        np.testing.assert_allclose(found.mean, values.astype(float).mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(found.deviation, values.astype(float).std(axis=0), rtol=1e-5)
    few = measured(values, 5, prompts=12)
    np.testing.assert_allclose(few.mean, values[:12].astype(float).mean(axis=0), rtol=1e-6)


def test_deviations_have_a_floor():
    values = np.random.default_rng(0).normal(size=(50, 2, 4)).astype(np.float32)
    values[:, 0, 1] = 7.0
    values[:, 1] = 1.0
    found = measured(values, 8)
    spread = np.sqrt((values[:, 0].astype(float).std(axis=0) ** 2).mean())
    np.testing.assert_allclose(found.deviation[0, 1], FLOOR * spread, rtol=1e-5)
    np.testing.assert_allclose(found.deviation[1], LEAST, rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((4, 3, 2), np.nan), "not finite on the frozen base, first in layer 0"),
        (np.zeros((1, 3, 2)), "expected at least 2, found 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(values, message):
    with pytest.raises(UserError) as error:
        measured(values, 4)
    assert message in str(error.value)


@pytest.mark.parametrize("pooler", ["attention", "mean", "max", "last"])
def test_answers_have_no_part_in_the_features(pooler):
    base, batch = random_base(MODEL), rows()
    calibration = build_method(dataclasses.replace(STANDARDIZED, pooler=pooler)).calibration
    program = feature_program(MODEL, calibration, attention)
    answers = batch.loss_mask & ~batch.prompt_mask
    other = batch.replace(tokens=np.where(answers, 5, batch.tokens))
    assert (np.asarray(other.tokens) != np.asarray(batch.tokens)).any()
    np.testing.assert_array_equal(program(base, batch)[0], program(base, other)[0])


@pytest.mark.thorough
def test_a_run_measures_before_its_first_step_and_stores_it(prepared, tmp_path):
    run, steps = prepared
    mine = dataclasses.replace(run, config=dataclasses.replace(run.config, adapter=STANDARDIZED))
    ended = fit(mine, steps, tmp_path / "run")
    assert ended.steps == STEPS
    router = load_adapter(tmp_path / "run").params.router
    kept = dataclasses.replace(mine.config, adapter=dataclasses.replace(STANDARDIZED, feature_window=0.0))
    still = fit(dataclasses.replace(mine, config=kept), steps, tmp_path / "still", stop_after=None)
    moved = np.abs(np.asarray(router.mean) - np.asarray(still.state.adapter.params.router.mean))
    assert 0 < moved.max() < 1, "the statistics follow, unless they are told not to"
    assert np.asarray(router.deviation).min() > 0
    assert np.abs(np.asarray(router.mean)).max() > 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    seen = [line for line in lines if "feature_spread" in line]
    assert seen
    for line in seen:
        assert 0 < max(line["router_input_max"]) <= 3
        assert len(line["route_common"]) == len(line["pooler_share"]) == run.model.num_layers
        assert all(0.2 < spread < 5 for spread in line["feature_spread"])


@pytest.mark.thorough
def test_a_run_stopped_inside_its_schedules_ends_as_the_undisturbed_one(prepared, tmp_path):
    run, steps = prepared
    section = dataclasses.replace(
        STANDARDIZED,
        top_k_anneal=0.7,
        balance="bias",
        balance_warmup=0.5,
        balance_decay=0.9,
        router_gradient="dense",
    )
    mine = dataclasses.replace(run, config=dataclasses.replace(run.config, adapter=section))
    whole = fit(mine, steps, tmp_path / "whole")
    with pytest.raises(Preempted):
        fit(mine, steps, tmp_path / "cut", stop_after=STOP)
    resumed = fit(mine, steps, tmp_path / "cut")
    assert resumed.steps == whole.steps == STEPS
    jax.tree.map(
        np.testing.assert_array_equal,
        *(jax.tree.map(np.asarray, dataclasses.replace(end.state, key=None)) for end in (whole, resumed)),
    )
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "cut")]
    untimed = [[{**json.loads(line), "tokens_per_second": 0} for line in log] for log in logs]
    assert untimed[0] == untimed[1]
