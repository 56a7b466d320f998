"""A packed step is the step of its records in rows of their own: loss, terms, routes, and the update."""

import dataclasses

import jax
import numpy as np
import pytest

from milora_jax.adapters.protocol import init_adapter
from milora_jax.adapters.registry import adapter_shape, build_method
from milora_jax.base.modules import frozen_kernels
from milora_jax.config import AdapterSection, TrainSection
from milora_jax.data.batches import collate
from milora_jax.data.packing import Rows
from milora_jax.data.tokens import Example
from milora_jax.training.step import init_state, make_steps
from tests.models import TINY, random_base, small

LENGTHS = [(4, 3), (6, 2), (2, 5), (3, 3), (9, 4), (1, 6), (5, 2), (7, 1)]
BASE = random_base(TINY)
COMPARED = ("loss", "cross_entropy", "load_balance", "grad_norm", "expert_share", "tokens")


def make_records():
    rng = np.random.default_rng(3)
    return [Example(rng.integers(3, TINY.vocab_size, p + a).astype(np.int32), p) for p, a in LENGTHS]


RECORDS = make_records()


def trained_state(settings, **adapter_settings):
    """A state whose adapter acts: every leaf is random, so every route and every expert matters."""
    method = build_method(AdapterSection(**{**small(adapter_settings), **adapter_settings}))
    adapter = init_adapter(method, jax.random.key(0), adapter_shape(TINY), frozen_kernels(BASE))
    leaves, structure = jax.tree.flatten(adapter.params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [leaf + 0.2 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
    adapter = dataclasses.replace(adapter, params=jax.tree.unflatten(structure, moved))
    return init_state(adapter, jax.random.key(2), settings, 10)


def by_record(rows, values):
    """``[L, B, Z, E]`` as ``[L, record, E]``."""
    places = {id(example): (b, z) for b, row in enumerate(rows) for z, example in enumerate(row)}
    return np.stack([np.asarray(values)[:, *places[id(example)]] for example in RECORDS], axis=1)


def updated(packed, settings=None, **adapter_settings):
    """The state and the metrics after a step, and what the evaluation before it gave."""
    settings = settings or TrainSection(learning_rate=1e-2, coefficient_learning_rate=1e-2)
    rows = Rows(RECORDS, 16 if packed else None)
    assert (len(rows) < len(RECORDS)) == packed
    batch = collate(rows, 16, len(rows), max(map(len, rows)))
    state = trained_state(settings, **adapter_settings)
    steps = make_steps(TINY, settings, 10)
    loss, tokens, route = steps.evaluate(state.adapter, BASE, batch)
    routes = None if route is None else [by_record(rows, values) for values in (route.weights, route.probs)]
    state, metrics = steps.train(state, BASE, batch)
    return state, metrics, (loss, tokens, routes)


def close(one, other, **tolerances):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerances), one, other)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "settings",
    [
        {"pooler": "attention"},
        pytest.param({"method": "iapt"}, marks=pytest.mark.slow),
        pytest.param({"pooler": "max", "gate": "softmax"}, marks=pytest.mark.slow),
        pytest.param({"method": "lora"}, marks=pytest.mark.slow),
        pytest.param({"pooler": "mean", "gate": "straight_through"}, marks=pytest.mark.slow),
        pytest.param({"pooler": "last"}, marks=pytest.mark.slow),
        pytest.param({"method": "p_tuning_v2"}, marks=pytest.mark.slow),
        pytest.param({"method": "moelora"}, marks=pytest.mark.slow),
        pytest.param({"method": "adalora"}, marks=pytest.mark.slow),
        pytest.param({"method": "parallel_adapter"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_packed_step_equals_an_unpacked_one(settings):
    one, one_metrics, packed = updated(True, **settings)
    many, many_metrics, apart = updated(False, **settings)
    close(packed, apart, rtol=1e-5, atol=1e-6)
    for name in COMPARED:
        close(getattr(one_metrics, name), getattr(many_metrics, name), rtol=1e-5, atol=1e-6)
    # The first moments are the gradients; parameters move by their sign, which rounding may turn.
    close(one.omega_state, many.omega_state, rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
def test_a_router_that_ignored_segments_would_be_seen():
    """Without the records' own routes the loss of a packed batch is another one."""
    rows = Rows(RECORDS, 16)
    batch = collate(rows, 16, len(rows), max(map(len, rows)))
    settings = TrainSection()
    state = trained_state(settings)
    steps = make_steps(TINY, settings, 10)
    right, _, route = steps.evaluate(state.adapter, BASE, batch)
    wrong, *_ = steps.evaluate(state.adapter, BASE, batch.replace(prompts=1))
    assert abs(float(right) - float(wrong)) > 1e-3 * float(right)
    differ = [
        (np.asarray(route.weights)[:, b, 0] != np.asarray(route.weights)[:, b, 1]).any() for b in range(2)
    ]
    assert any(differ)


@pytest.mark.thorough
@pytest.mark.parametrize("settings", [{}, pytest.param({"method": "lora"}, marks=pytest.mark.slow)], ids=str)
def test_a_step_in_parts_is_the_whole_step(settings):
    whole = TrainSection(learning_rate=1e-2, coefficient_learning_rate=1e-2)
    one, one_metrics, _ = updated(False, whole, **settings)
    many, many_metrics, _ = updated(False, dataclasses.replace(whole, accumulate=4), **settings)
    for name in (*COMPARED, "pooled_max"):
        close(getattr(many_metrics, name), getattr(one_metrics, name), rtol=1e-5, atol=1e-6)
    close(many.omega_state, one.omega_state, rtol=1e-4, atol=1e-6)


@pytest.mark.thorough
def test_the_balance_term_of_parts_alone_would_be_another():
    """Why the shares of first choices are taken from the whole batch (Eq. 4)."""
    settings = TrainSection()
    state = trained_state(settings)
    steps = make_steps(TINY, settings, 10)
    batch = collate(Rows(RECORDS, None), 16, len(LENGTHS))
    balance = []
    for part in (slice(0, 4), slice(4, 8), slice(0, 8)):
        _, _, route = steps.evaluate(
            state.adapter, BASE, jax.tree.map(lambda leaf, part=part: leaf[part], batch)
        )
        probs = np.asarray(route.probs)[:, :, 0]
        first = np.stack([(probs.argmax(-1) == e).mean(1) for e in range(7)], axis=-1)
        balance.append(7 * (first * probs.mean(1)).sum(-1).mean())
    assert abs(np.mean(balance[:2]) - balance[2]) > 1e-3
