"""AdaLoRA's budget and SSP's search: what is left in the end is what the budget allows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.adapters.ssp import budgeted, within_budget
from milora_jax.training.loss import adapted_loss
from milora_jax.types import EXPERTS
from tests.adapted import BASE, make_adapter, run
from tests.models import TINY, random_base
from tests.training.steps import MODEL, prepare, rows

TOTAL = 40


def train(method, count, **settings):
    state, steps = prepare(count, method=method, **settings)
    for i in range(count):
        state, _ = steps.train(state, random_base(MODEL), rows())
        state, _ = steps.coefficients(state, random_base(MODEL), rows(i))
    return state, steps


def kept_of(params):
    return np.stack([np.asarray(params[name].singular) != 0 for name in EXPERTS])


def test_the_budget_falls_by_a_cubic():
    method = make_adapter(method="adalora", rank=2, prune_start=0.25, prune_end=0.75).method
    found = list(method.budgets(100, 50, TOTAL)[[0, 10, 15, 20, 30, 40]])
    assert found == [100, 100, 50 + 50 * 0.75**3 // 1, 50 + 50 * 0.5**3 // 1, 50, 50]


@pytest.mark.thorough
def test_adalora_ends_with_its_budget_and_what_is_out_stays_out():
    state, steps = prepare(
        TOTAL, method="adalora", rank=2, prune_start=0.1, prune_end=0.5, prune_every=5, initial_rank=6
    )
    counts = []
    for _ in range(TOTAL):
        state, _ = steps.train(state, random_base(MODEL), rows())
        counts.append(int(kept_of(state.adapter.params).sum()))
        if len(counts) == TOTAL // 2:
            left = kept_of(state.adapter.params)
    everything, budget = MODEL.num_layers * 7 * 6, MODEL.num_layers * 7 * 2
    assert counts[0] == everything
    assert set(counts[TOTAL // 2 - 1 :]) == {budget}
    assert budget < counts[9] < everything
    method = state.adapter.method
    assert [method.ready(step, TOTAL) for step in (19, 20)] == [False, True]
    kept = [triplets.singular != 0 for triplets in state.adapter.params.values()]
    sizes = [t.a.shape[1] + t.b.shape[2] + 1 for t in state.adapter.params.values()]
    counted = method.count_parameters(state.adapter.params)
    assert counted == sum(int(k.sum()) * size for k, size in zip(kept, sizes, strict=True))
    np.testing.assert_array_equal(kept_of(state.adapter.params), left)
    ranks = left.sum(axis=-1)
    assert ranks.min() < 2 < ranks.max(), "every module kept the same rank: nothing was chosen"


@pytest.mark.thorough
def test_adalora_keeps_what_matters():
    adapter = make_adapter(method="adalora", rank=1, initial_rank=4)
    method, params = adapter.method, adapter.params
    wanted = jnp.arange(4) == 2
    grads = jax.tree.map(jnp.ones_like, params)
    grads = {
        name: g.replace(singular=jnp.broadcast_to(jnp.where(wanted, 50.0, 1.0), g.singular.shape))
        for name, g in grads.items()
    }
    params = {name: p.replace(singular=jnp.ones_like(p.singular)) for name, p in params.items()}
    memory = method.init_memory(params)
    for step in (27, 28):
        pruned, memory = method.after_update(params, grads, memory, jnp.asarray(step), 40)
        assert kept_of(pruned).all() == (step == 27)
    assert (kept_of(pruned) == np.asarray(wanted)).all()
    assert bool(memory.settled)
    again, memory = method.after_update(params, grads, memory, jnp.asarray(30), 40)
    assert (kept_of(again) == np.asarray(wanted)).all(), "what is out stays out"


@pytest.mark.thorough
def test_the_last_pruning_is_made_up_for_if_its_step_was_skipped():
    adapter = make_adapter(method="adalora", rank=1, initial_rank=4)
    grads = jax.tree.map(jnp.ones_like, adapter.params)
    memory = adapter.method.init_memory(adapter.params)
    late, memory = adapter.method.after_update(adapter.params, grads, memory, jnp.asarray(33), 40)
    assert kept_of(late).sum() == kept_of(late).size // 4
    assert bool(memory.settled)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["sensitivity_decay", "spread_decay"])
def test_the_decays_of_adalora_enter_its_memory(name):
    adapter = make_adapter(method="adalora")
    grads = jax.tree.map(jnp.ones_like, adapter.params)
    found = []
    for decay in (0.85, 0.5):
        method = make_adapter(method="adalora", **{name: decay}).method
        memory = method.init_memory(adapter.params)
        _, memory = method.after_update(adapter.params, grads, memory, jnp.asarray(1), TOTAL)
        found.append(memory.mean["q"].a if name == "sensitivity_decay" else memory.spread["q"].a)
    assert float(jnp.abs(found[0] - found[1]).max()) > 1e-3


@pytest.mark.thorough
def test_the_penalty_of_adalora_is_the_distance_from_orthogonality():
    adapter = make_adapter(method="adalora", orthogonality=0.5)
    distances = [
        np.linalg.norm(gram - np.eye(gram.shape[-1]))
        for triplets in adapter.params.values()
        for layer in range(TINY.num_layers)
        for gram in (
            np.asarray(triplets.a[layer]).T @ np.asarray(triplets.a[layer]),
            np.asarray(triplets.b[layer]) @ np.asarray(triplets.b[layer]).T,
        )
    ]
    penalty = adapter.method.penalty(adapter.params)
    np.testing.assert_allclose(penalty, 0.5 * np.mean(distances), rtol=1e-5)
    batch = rows()
    value, parts = adapted_loss(adapter, BASE, TINY, batch, key=None)
    np.testing.assert_allclose(value, parts.cross_entropy + penalty, rtol=1e-6)


def test_the_expected_size_of_ssp_is_its_budget():
    logits = 3.0 * jax.random.normal(jax.random.key(0), (5, 7))
    sizes = jnp.array([1.0, 0.7, 0.7, 1.0, 1.3, 1.3, 1.0])
    gates = budgeted(logits, sizes)
    np.testing.assert_allclose((gates * sizes[None]).sum(), 0.5 * 5 * sizes.sum(), rtol=1e-4)
    order = np.argsort(np.asarray(logits).ravel())
    assert (np.diff(np.asarray(gates).ravel()[order]) >= 0).all()


def test_ssp_fills_the_budget_in_the_order_of_its_gates():
    logits = jnp.array([[5.0, 4.0, 3.0, 2.0]])
    chosen = within_budget(logits, jnp.array([2.0, 1.0, 3.0, 0.5]))  # half of all is 3.25
    np.testing.assert_array_equal(chosen, [[True, True, False, False]])
    chosen = within_budget(logits, jnp.array([2.0, 3.0, 1.0, 0.1]))  # 3.05
    np.testing.assert_array_equal(chosen, [[True, False, True, False]])


@pytest.mark.thorough
def test_ssp_decides_within_the_budget_and_sticks_to_it():
    state, steps = train("ssp", 12, search_share=0.5, rank=2)
    assert not state.adapter.method.ready(6, 12)
    assert state.adapter.method.ready(7, 12)
    decided = np.asarray(state.adapter.method.settle(state.adapter.params).openness)
    assert set(np.unique(decided)) == {0.0, 1.0}
    sizes = np.array([2 * 2 * sum(MODEL.module_dims[name]) for name in EXPERTS])
    budget = state.adapter.method.tunable_parameters(state.adapter.shape)
    used = (decided * sizes).sum()
    assert budget - sizes.min() < used <= budget
    assert state.adapter.method.count_parameters(state.adapter.params) == used
    state, _ = steps.coefficients(state, random_base(MODEL), rows(3))
    again, _ = steps.train(state, random_base(MODEL), rows())
    np.testing.assert_array_equal(again.adapter.method.settle(again.adapter.params).openness, decided)


@pytest.mark.thorough
def test_ssp_searches_by_the_gradient_of_the_dev_rows():
    """Before the decision the gates differ, and a more open gate has more effect."""
    state, _ = train("ssp", 4, search_share=0.9, rank=2)
    gates = np.asarray(state.adapter.method.settle(state.adapter.params).openness)
    assert 0 < gates.min() < gates.max() < 1
    adapter = make_adapter(method="ssp")
    wide = adapter.replace(params=adapter.params.replace(openness=adapter.params.openness.at[0, 0].add(2.0)))
    assert float(jnp.abs(run(adapter, rows()).hidden - run(wide, rows()).hidden).max()) > 1e-6
