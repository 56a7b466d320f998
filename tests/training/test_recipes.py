"""Recipes of the optimiser: schedules, and what each changes in a step."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from milora_jax.adapters.hooks import abstract_params, path_names
from milora_jax.adapters.protocol import output_mask
from milora_jax.adapters.registry import adapter_shape, build_method
from milora_jax.config import SCHEDULES, AdapterSection, Config, DataSection, ModelSection, TrainSection
from milora_jax.errors import Preempted, UserError
from milora_jax.training.optim import leaf_rates, learning_rate_schedule, make_optimizer
from milora_jax.training.prepare import prepare_run
from milora_jax.training.step import make_steps
from tests.models import random_base, write_hf_directory
from tests.training.short_runs import STEPS, STOP, fit, prepare_short_run
from tests.training.steps import MODEL, SETTINGS, TOTAL, params_of, prepare, rows


def rates(total=100, peak=1.0, **settings):
    schedule = learning_rate_schedule(TrainSection(**settings), total, peak)
    return np.array([float(np.asarray(schedule(step))) for step in range(total + 1)])


def test_the_learning_rate_rises_and_falls_linearly():
    values = rates(warmup_share=0.1)
    np.testing.assert_allclose(values[:10], np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(values[10:], 1 - np.arange(91) / 90, rtol=1e-5, atol=1e-6)
    assert rates(10, 3.0, warmup_share=0.0)[0] == 3.0


@pytest.mark.thorough
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


@pytest.mark.thorough
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
        ({"optimizer": "sgd"}, "train.optimizer is 'sgd': expected one of adamw, adafactor"),
        (
            {"decay_share": 0.5},
            "train.decay_share is 0.5: expected its default: only schedule 'wsd' reads it",
        ),
        ({"decay_share": 0.0}, "train.decay_share is 0.0: expected above 0, up to 1"),
        ({"neftune_alpha": -1.0}, "train.neftune_alpha is -1.0: expected 0 or more"),
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


WITH_B = {"milora": 7, "midora": 7, "lora": 7, "dora": 7, "moelora": 7, "ssp": 7, "adalora": 0, "ia3": 0}
"""How many leaves of a method LoRA+ applies to."""


@pytest.mark.parametrize(("method", "count"), WITH_B.items())
def test_the_leaves_of_lora_plus_are_the_b_of_every_pair(method, count):
    built = build_method(AdapterSection(method=method))
    params = abstract_params(built, adapter_shape(MODEL))
    chosen = jax.tree.map(lambda leaf, is_b: leaf if is_b else None, params, output_mask(built, params))
    paths = [path_names(path) for path, _ in jax.tree_util.tree_leaves_with_path(chosen)]
    assert len(paths) == count
    assert all(path[-1] == "b" and "router" not in path for path in paths)


def test_b_and_routers_have_their_own_multiples_of_the_learning_rate():
    built = build_method(AdapterSection(method="milora"))
    params = abstract_params(built, adapter_shape(MODEL))
    settings = TrainSection(lora_plus_ratio=16.0, router_rate=3.0)
    found = leaf_rates(built, params, jnp.float32(0.5), settings)
    assert {float(pair.a) for pair in found.experts.values()} == {0.5}
    assert {float(pair.b) for pair in found.experts.values()} == {8.0}
    assert {float(rate) for rate in jax.tree.leaves(found.router)} == {1.5}


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_a_ratio_of_0_or_1_leaves_every_rate(ratio):
    built = build_method(AdapterSection(method="milora"))
    params, rate = abstract_params(built, adapter_shape(MODEL)), jnp.float32(0.5)
    found = leaf_rates(built, params, rate, TrainSection(lora_plus_ratio=ratio))
    assert all(leaf is rate for leaf in jax.tree.leaves(found.experts))


@pytest.mark.thorough
def test_lora_plus_moves_b_as_many_times_as_far():
    """Adam's first update is the learning rate itself, up to the sign; A's gradient is zero then."""
    moved = {}
    for ratio in (0.0, 4.0):
        settings = dataclasses.replace(SETTINGS, lora_plus_ratio=ratio, clip_norm=0.0)
        state, steps = prepare(settings=settings, method="lora")
        state, _ = steps.train(state, random_base(MODEL), rows())
        moved[ratio] = params_of(state)["q"].b
    np.testing.assert_allclose(moved[4.0], 4.0 * moved[0.0], rtol=1e-6)
    assert float(np.abs(moved[0.0]).max()) == pytest.approx(SETTINGS.learning_rate / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (
            "adalora",
            {"lora_plus_ratio": 16.0},
            "lora_plus_ratio is 16.0: expected 0 or 1, method 'adalora' has",
        ),
        (
            "moelora",
            {"neftune_alpha": 5.0},
            "neftune_alpha is 5.0: expected 0, the routers of method 'moelora'",
        ),
    ],
)
def test_what_a_method_cannot_have_is_refused_before_rows_are_read(method, settings, message, tmp_path):
    write_hf_directory(tmp_path, MODEL, tokenizer=False)
    config = Config(
        model=ModelSection(path=str(tmp_path)),
        adapter=AdapterSection(method=method),
        data=DataSection(train="nowhere.json"),
        train=TrainSection(**settings),
    )
    with pytest.raises(UserError) as error:
        prepare_run(config, None, print)
    assert message in str(error.value)


def adafactor_step(grad, row, column, step):
    """Algorithm 4 of the paper for one matrix, in float64, at a learning rate of 1."""
    decay = 1 - (step + 1.0) ** -0.8
    square = grad.astype(np.float64) ** 2 + 1e-30
    row = decay * row + (1 - decay) * square.mean(axis=1)
    column = decay * column + (1 - decay) * square.mean(axis=0)
    update = grad / np.sqrt(np.outer(row, column) / row.mean())
    return update / max(1.0, np.sqrt((update**2).mean())), row, column


@pytest.mark.thorough
def test_adafactor_is_its_algorithm_layer_by_layer():
    """Three layers, more than the rank of two: optax alone would factor over the layers."""
    rng, shape = np.random.default_rng(0), (3, 5, 2)
    start = rng.normal(size=shape).astype(np.float32)
    settings = TrainSection(optimizer="adafactor", schedule="constant", warmup_share=0.0, weight_decay=0.1)
    optimizer = make_optimizer(settings, 10)
    params, expected = {"a": jnp.asarray(start)}, start.astype(np.float64)
    state, rows_of, columns = optimizer.init(params), np.zeros((3, 5)), np.zeros((3, 2))
    for step in range(4):
        grad = rng.normal(size=shape).astype(np.float32) * (step + 1)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update({"a": jnp.asarray(grad)}, state, params)
        params = optax.apply_updates(params, updates)
        for i in range(3):
            update, rows_of[i], columns[i] = adafactor_step(grad[i], rows_of[i], columns[i], step)
            expected[i] -= update + 0.1 * expected[i]
        np.testing.assert_allclose(params["a"], expected, rtol=2e-5, atol=2e-5)


def state_size(method, **settings):
    built = build_method(AdapterSection(method=method, rank=4))
    params = abstract_params(built, adapter_shape(MODEL))
    state = jax.eval_shape(make_optimizer(TrainSection(**settings), 10).init, params)
    return sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)


def test_the_states_of_adafactor_are_rows_and_columns():
    pairs = [(d_in, d_out) for d_in, d_out in MODEL.module_dims.values()]
    assert state_size("lora") == 2 * MODEL.num_layers * 4 * sum(map(sum, pairs))
    # of A and of B a row and a column each, and a placeholder of 1 for the whole
    factored = sum(d_in + 4 + 4 + d_out + 2 for d_in, d_out in pairs)
    assert state_size("lora", optimizer="adafactor") == MODEL.num_layers * factored


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["milora", "dora", "adalora", "iapt"])
def test_adafactor_trains_every_kind_of_leaf(method):
    state, steps = prepare(settings=dataclasses.replace(SETTINGS, optimizer="adafactor"), method=method)
    base, losses = random_base(MODEL), []
    for _ in range(6):
        state, metrics = steps.train(state, base, rows())
        losses.append(float(metrics.cross_entropy))
    assert losses[-1] < (0.999 if method == "adalora" else 0.97) * losses[0], losses
    assert int(metrics.bad_steps) == 0
    assert steps.train._cache_size() == 1
    if method == "milora":
        state, metrics = steps.coefficients(state, base, rows(9))
        assert int(metrics.bad_steps) == 0


ALL = {"schedule": "wsd", "lora_plus_ratio": 4.0, "neftune_alpha": 5.0, "optimizer": "adafactor"}


@pytest.mark.thorough
def test_a_run_with_every_recipe_resumes_to_the_same_bits(tmp_path):
    pytest.importorskip("transformers", reason="prompts need a tokenizer, which the core does without")
    run, _ = prepare_short_run(tmp_path)
    settings = dataclasses.replace(run.config.train, learning_rate=1e-3, log_every=1, **ALL)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, train=settings))
    steps = make_steps(run.model, settings, STEPS)
    whole = fit(run, steps, tmp_path / "whole").state
    with pytest.raises(Preempted):
        fit(run, steps, tmp_path / "cut", stop_after=STOP)
    resumed = fit(run, steps, tmp_path / "cut").state
    for part in ("adapter", "omega_state", "theta_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(whole, part), getattr(resumed, part))
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    logged = [line["learning_rate"] for line in lines if "learning_rate" in line]
    np.testing.assert_allclose(logged, rates(STEPS, 1e-3, schedule="wsd")[:STEPS], rtol=1e-6)
