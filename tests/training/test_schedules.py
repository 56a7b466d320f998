"""Schedules of the routing: what they are at every step, and that none leaves a trace in what is saved."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.adapters.inputs import ExpertUse
from milora_jax.adapters.milora import MiLoRA
from milora_jax.base.transformer import forward
from milora_jax.errors import UserError
from tests.models import random_base
from tests.programs import compiled
from tests.training.steps import MODEL, SETTINGS, params_of, prepare, rows

TOTAL = 20


def over_a_run(method, total=TOTAL):
    found = [method.schedule(jnp.asarray(step), total) for step in range(total)]
    ks = [None if each.top_k is None else int(each.top_k) for each in found]
    return ks, np.array([float(each.load_balance) for each in found])


def test_k_falls_from_seven_and_stays_as_long_at_every_number():
    ks, weights = over_a_run(MiLoRA(top_k=3, top_k_anneal=0.4, load_balance=0.01))
    assert ks == [7, 7, 6, 6, 5, 5, 4, 4] + [3] * 12
    np.testing.assert_allclose(weights, 0.01)
    assert over_a_run(MiLoRA(top_k=3, top_k_anneal=0.0))[0] == [None] * TOTAL
    assert over_a_run(MiLoRA(top_k=3, top_k_anneal=0.4), 1)[0] == [None], "one step is one at the final k"
    assert over_a_run(MiLoRA(top_k=1, top_k_anneal=0.99), 5)[0][-1] == 1, "the last step is at the final k"


def test_lambda_rises_and_is_given_up():
    weights = over_a_run(MiLoRA(load_balance=0.1, balance_warmup=0.2, balance_until=0.5))[1]
    np.testing.assert_allclose(weights, [0.025, 0.05, 0.075, *[0.1] * 7, *[0.0] * 10], rtol=1e-6)


def test_only_a_step_after_all_schedules_can_be_the_best():
    def first(total=TOTAL, **settings):
        method = MiLoRA(**{"top_k_anneal": 0.0, **settings})
        return next(step for step in range(1, total + 1) if method.ready(step, total))

    assert first() == 1
    assert first(1, top_k_anneal=0.4) == 1
    assert first(top_k_anneal=0.4) == 9
    assert first(top_k_anneal=0.4, balance_warmup=0.5) == 11
    assert first(balance_until=0.5) == 11
    assert first(top_k_anneal=0.99) == TOTAL


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k_anneal": 1.0}, "adapter.top_k_anneal is 1.0: expected from 0 to below 1"),
        ({"top_k_anneal": -0.1}, "adapter.top_k_anneal"),
        ({"top_k_anneal": float("nan")}, "adapter.top_k_anneal"),
        ({"balance_warmup": 1.5}, "adapter.balance_warmup"),
        ({"balance_until": 0.0}, "adapter.balance_until is 0.0: expected above 0, up to 1"),
        ({"balance_warmup": 0.5, "balance_until": 0.5}, "less than adapter.balance_until"),
        ({"balance_decay": 1.0}, "adapter.balance_decay"),
        ({"bias_rate": float("inf")}, "adapter.bias_rate"),
        ({"features": "centred"}, "adapter.features is 'centred'"),
        ({"router_gradient": "all"}, "adapter.router_gradient is 'all'"),
        ({"balance": "none"}, "adapter.balance is 'none'"),
    ],
)
def test_a_setting_out_of_its_range_is_named(settings, message):
    with pytest.raises(UserError) as error:
        MiLoRA(**settings)
    assert message in str(error.value)


@pytest.mark.thorough
def test_a_falling_k_compiles_one_step_and_evaluates_at_the_final_k():
    state, steps = prepare(top_k_anneal=0.4, top_k=2)
    base, shares = random_base(MODEL), []
    for _ in range(10):
        state, metrics = steps.train(state, base, rows())
        shares.append(round(float(metrics.expert_share.sum(axis=1).mean()), 4))
        route = steps.evaluate(state.adapter, base, rows())[2]
        assert set(np.unique((np.asarray(route.weights) != 0).sum(axis=-1))) == {2}
    assert shares == [7, 7, 6, 6, 5, 4, 4, 3, 2, 2]
    assert steps.train._cache_size() == steps.evaluate._cache_size() == 1


@pytest.mark.thorough
def test_steps_after_an_annealing_are_those_of_a_method_without():
    """From the same state: nothing but the number of the step says that there was one."""
    annealed, annealing = prepare(top_k_anneal=0.4)
    for _ in range(9):
        annealed, _ = annealing.train(annealed, random_base(MODEL), rows())
    plain, steps = prepare()
    method = dataclasses.replace(annealed.adapter.method, top_k_anneal=0.0)
    adapter = dataclasses.replace(annealed.adapter, method=method)
    plain = dataclasses.replace(jax.tree.map(jnp.copy, annealed), adapter=jax.tree.map(jnp.copy, adapter))
    ends = []
    for made, state in ((annealing, annealed), (steps, plain)):
        given = state, random_base(MODEL), rows()
        ends.append(params_of(compiled(made.train.lower(*given))(*given)[0]))
    jax.tree.map(np.testing.assert_array_equal, *ends)


@pytest.mark.thorough
def test_a_bias_balances_the_load_and_is_trained_by_no_gradient():
    settings = {"balance": "bias", "bias_rate": 0.05, "load_balance": 0.0}
    state, steps = prepare(**settings)
    held = dataclasses.replace(state.adapter.method, bias_rate=0.0)
    still = dataclasses.replace(jax.tree.map(jnp.copy, state.adapter), method=held)
    still = dataclasses.replace(jax.tree.map(jnp.copy, state), adapter=still)
    base, unmoved, balanced = random_base(MODEL), [], []
    for _ in range(TOTAL):
        state, moved = steps.train(state, base, rows())
        still, fixed = steps.train(still, base, rows())
        assert float(moved.loss) == float(moved.cross_entropy)
        unmoved.append(np.asarray(fixed.expert_share))
        balanced.append(np.asarray(moved.expert_share))
    # Prompts as much alike as these move together, so that the load is even over steps, not within one.
    assert np.mean(balanced[8:], axis=0).std() < 0.5 * np.mean(unmoved[8:], axis=0).std()
    np.testing.assert_array_equal(still.adapter.params.router.bias, 0)
    assert float(jnp.abs(state.adapter.params.router.bias).max()) > 0
    route = forward(base, MODEL, rows(), adapter=state.adapter).route
    assert set(np.unique((np.asarray(route.weights) != 0).sum(axis=-1))) == {3}


def test_the_bias_moves_against_use_until_balancing_ends():
    method = MiLoRA(rank=4, balance="bias", bias_rate=0.1, balance_until=0.5)
    state, _ = prepare(balance="bias")
    chosen = jnp.tile(jnp.array([0.0, 1.0, 0.5, 0.5, 0.5, 0.2, 0.8]), (MODEL.num_layers, 1))
    use = ExpertUse(chosen, chosen)
    for step, expected in ((10, [0.1, -0.1, 0, 0, 0, 0.1, -0.1]), (11, [0] * 7)):
        params, _ = method.after_update(state.adapter.params, None, None, jnp.asarray(step), TOTAL, use)
        np.testing.assert_allclose(params.router.bias[0], expected, atol=1e-7)


@pytest.mark.thorough
def test_first_choices_are_averaged_over_steps():
    """``f_i`` weighs the step before last by the square of the decay; the first step by nothing else."""
    method = MiLoRA(rank=4, balance_decay=0.5)
    state, _ = prepare(balance_decay=0.5)
    memory = state.memory
    firsts = [jnp.eye(7)[i][None].repeat(MODEL.num_layers, axis=0) for i in range(3)]
    for i, first in enumerate(firsts):
        found = method.first_choices(memory, first)
        weights = 0.5 ** np.arange(i, -1, -1.0)
        np.testing.assert_allclose(found[0, : i + 1], weights / weights.sum(), rtol=1e-6)
        use = ExpertUse(first, first)
        _, memory = method.after_update(state.adapter.params, None, memory, jnp.asarray(i + 1), TOTAL, use)
    base = random_base(MODEL)
    losses = {}
    for decay in (0.0, 0.5):
        state, steps = prepare(balance_decay=decay, load_balance=0.5)
        losses[decay] = []
        for i in range(2):
            state, metrics = steps.train(state, base, rows(seed=40 * i))
            losses[decay].append(float(metrics.loss))
    assert losses[0.0][0] == losses[0.5][0]
    assert losses[0.0][1] != losses[0.5][1]


@pytest.mark.thorough
@pytest.mark.parametrize("accumulate", [2, 4])
def test_parts_of_a_batch_see_the_same_schedules(accumulate):
    settings = {"top_k_anneal": 0.4, "balance": "bias", "balance_decay": 0.5, "router_gradient": "dense"}
    ends = []
    for parts in (1, accumulate):
        state, steps = prepare(settings=dataclasses.replace(SETTINGS, accumulate=parts), **settings)
        for _ in range(3):
            state, metrics = steps.train(state, random_base(MODEL), rows())
        ends.append((params_of(state), float(metrics.loss)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), *ends)


@pytest.mark.thorough
def test_the_routers_gradient_is_clipped_apart():
    def updates(**settings):
        settings = dataclasses.replace(SETTINGS, **settings)
        # Experts that change nothing yet tell the router nothing; the load balance does.
        state, steps = prepare(settings=settings, load_balance=0.5)
        return steps.train(state, random_base(MODEL), rows())

    _, metrics = updates()
    assert 0 < float(metrics.router_grad_norm) < float(metrics.grad_norm)
    plain, _ = updates(clip_norm=0.0)
    apart, _ = updates(clip_norm=0.0, router_clip_norm=1e-9)
    # Adam divides by the gradient's own size, until that is near its epsilon of 1e-8.
    start = params_of(prepare()[0])
    moved = {
        name: float(np.abs(params_of(state).router.weight - start.router.weight).max())
        for name, state in (("plain", plain), ("apart", apart))
    }
    assert moved["apart"] < 0.2 * moved["plain"]
    jax.tree.map(np.testing.assert_array_equal, params_of(plain).experts, params_of(apart).experts)
