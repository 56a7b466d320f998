"""Recipes of the optimiser: schedules, and what each changes in a step."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from milora_jax.config import SCHEDULES, TrainSection
from milora_jax.errors import UserError
from milora_jax.training.optim import learning_rate_schedule, make_optimizer
from tests.models import random_base
from tests.training.steps import MODEL, SETTINGS, TOTAL, params_of, prepare, rows


def rates(total=100, peak=1.0, **settings):
    schedule = learning_rate_schedule(TrainSection(**settings), total, peak)
    return np.array([float(np.asarray(schedule(step))) for step in range(total + 1)])


def test_the_learning_rate_rises_and_falls_linearly():
    values = rates(warmup_share=0.1)
    np.testing.assert_allclose(values[:10], np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(values[10:], 1 - np.arange(91) / 90, rtol=1e-5, atol=1e-6)
    assert rates(10, 3.0, warmup_share=0.0)[0] == 3.0


def test_the_default_schedule_is_the_one_from_before_to_the_bit():
    rise, fall = optax.linear_schedule(0.1, 1.0, 9), optax.linear_schedule(1.0, 0.0, 90)
    before = optax.adamw(optax.join_schedules([rise, fall], [10]), weight_decay=0.1)
    now = make_optimizer(TrainSection(warmup_share=0.1, weight_decay=0.1), 100)
    grads = [{"w": np.random.default_rng(i).normal(size=(3, 4)).astype(np.float32)} for i in range(20)]
    ends = []
    for optimizer in (before, now):
        params = {"w": np.ones((3, 4), np.float32)}
        state = optimizer.init(params)
        for grad in grads:
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(grad, state, params)
            params = optax.apply_updates(params, updates)
        ends.append((params, state))
    assert jax.tree.structure(ends[0]) == jax.tree.structure(ends[1])
    jax.tree.map(np.testing.assert_array_equal, *ends)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_warms_up_alike(schedule):
    values = rates(warmup_share=0.1, schedule=schedule)
    np.testing.assert_allclose(values[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert len({tuple(rates(schedule=name)) for name in SCHEDULES}) == len(SCHEDULES)


def test_cosine_constant_and_wsd_are_their_formulas():
    after = np.arange(91)
    cosine = 0.5 * (1 + np.cos(np.pi * after / 90))
    np.testing.assert_allclose(rates(warmup_share=0.1, schedule="cosine")[10:], cosine, atol=1e-6)
    np.testing.assert_array_equal(rates(warmup_share=0.1, schedule="constant")[10:], 1.0)
    wsd = np.minimum(1.0, (100 - np.arange(10, 101)) / 30)
    found = rates(warmup_share=0.1, schedule="wsd", decay_share=0.3)
    np.testing.assert_allclose(found[10:], wsd, atol=1e-6)
    # Without a stable part it is the linear schedule.
    linear = rates(warmup_share=0.1)
    np.testing.assert_allclose(rates(warmup_share=0.1, schedule="wsd", decay_share=0.9), linear, atol=1e-6)
    assert rates(1, schedule="wsd")[0] == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "step"}, "train.schedule is 'step': expected one of linear, cosine, constant, wsd"),
        ({"decay_share": 0.0}, "train.decay_share is 0.0: expected above 0, up to 1"),
        ({"decay_share": float("nan")}, "train.decay_share is nan"),
        ({"schedule": "wsd", "warmup_share": 0.5, "decay_share": 0.6}, "at most 1 - train.warmup_share"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(settings, message):
    with pytest.raises(UserError) as error:
        TrainSection(**settings)
    assert message in str(error.value)


@pytest.mark.thorough
def test_a_step_takes_the_rate_of_its_schedule():
    """From one state in the middle of a run, the updates are apart by the rates alone."""
    base, at = random_base(MODEL), 14
    state, steps = prepare(method="lora")
    for _ in range(at):
        state, _ = steps.train(state, base, rows())
    before, moved = params_of(state), {}
    for name in ("linear", "cosine"):
        settings = dataclasses.replace(SETTINGS, schedule=name)
        _, steps = prepare(settings=settings, method="lora")
        after, _ = steps.train(jax.tree.map(lambda leaf: leaf.copy(), state), base, rows())
        moved[name] = (params_of(after)["q"].b - before["q"].b) / rates(
            TOTAL, warmup_share=0.1, schedule=name
        )[at]
    np.testing.assert_allclose(moved["linear"], moved["cosine"], rtol=1e-3, atol=1e-6)
    assert float(np.abs(moved["linear"]).max()) > 1e-4
