"""One training step: compiled once, no gradient of the base, the same on any mesh, safe from NaN."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from milora_jax.adapters.hooks import path_names
from milora_jax.adapters.protocol import router_mask
from milora_jax.config import MeshSection
from milora_jax.errors import UserError
from milora_jax.parallel.mesh import check_divides, make_mesh
from milora_jax.parallel.rules import base_shardings, batch_sharding, state_shardings
from milora_jax.training.loss import adapted_loss
from milora_jax.types import EXPERTS
from tests.models import random_base
from tests.programs import compiled, frozen_shaped_dots
from tests.training.steps import MODEL, SETTINGS, TOTAL, params_of, prepare, rows


def same(one, other):
    return jax.tree.map(lambda a, b: bool((a == b).all()), one, other)


@pytest.mark.sweep("milora")
@pytest.mark.parametrize("method", ["milora", "lora", "adalora", "iapt", "ia3"])
def test_steps_compile_once_and_lower_the_loss(method):
    state, steps = prepare(method=method)
    base, losses = random_base(MODEL), []
    for i in range(6):
        state, metrics = steps.train(state, base, rows())
        losses.append(float(metrics.cross_entropy))
        assert int(state.step) == i + 1
        assert int(metrics.tokens) == int(rows().loss_mask.sum())
    assert all(np.diff(losses) < 0), losses
    assert losses[-1] < (0.998 if method == "adalora" else 0.95) * losses[0], losses
    assert steps.train._cache_size() == 1
    if method == "milora":
        scheduled = state.adapter.method.schedule(jnp.asarray(5), TOTAL)
        np.testing.assert_allclose(metrics.expert_share.sum(axis=1), scheduled.top_k, rtol=1e-6)
        assert float(metrics.pooled_max) > 0
        assert float(metrics.load_balance) >= 1 - 1e-5  # its minimum, reached by an even load


@pytest.mark.thorough
def test_the_load_balance_term_is_weighed_by_lambda():
    found = {}
    for weight in (0.0, 0.5):
        state, steps = prepare(load_balance=weight)
        _, found[weight] = steps.train(state, random_base(MODEL), rows())
    assert float(found[0.0].loss) == float(found[0.0].cross_entropy)
    balance = float(found[0.5].load_balance)
    np.testing.assert_allclose(found[0.5].loss, found[0.0].loss + 0.5 * balance, rtol=1e-6)


@pytest.mark.thorough
def test_the_base_gets_no_gradient():
    state, steps = prepare()
    base, batch = random_base(MODEL), rows(count=5)  # 60 tokens: no activation has a weight's shape
    program = compiled(steps.train.lower(state, base, batch)).as_text()
    assert not frozen_shaped_dots(program)
    trained = [leaf.shape for leaf in jax.tree.leaves(state.omega_state)]
    assert not any(shape[-2:] in MODEL.module_dims.values() for shape in trained)

    def loss(base):
        return adapted_loss(state.adapter, base, MODEL, batch, key=None)[0]

    with_gradient = compiled(jax.jit(jax.grad(loss)).lower(base)).as_text()
    assert frozen_shaped_dots(with_gradient), "the search above would not see a gradient of the base"


def theta_mask(adapter):
    """A tree like the parameters that is True on the leaves of Theta."""
    role = adapter.method.role
    return jax.tree_util.tree_map_with_path(
        lambda path, _: role(path_names(path)).coefficient, adapter.params
    )


@pytest.mark.thorough
def test_the_two_optimisers_change_what_is_theirs():
    state, steps = prepare()
    is_theta = theta_mask(state.adapter)
    base, before = random_base(MODEL), params_of(state)
    state, _ = steps.train(state, base, rows())
    middle = params_of(state)
    kept = same(before, middle)
    frozen = jax.tree.map(lambda theta, equal: equal or not theta, is_theta, kept)
    assert all(jax.tree.leaves(frozen)), "Theta moved"
    assert not all(jax.tree.leaves(kept))
    state, _ = steps.coefficients(state, base, rows(9))
    kept = same(middle, params_of(state))
    split = jax.tree.map(lambda theta, equal: theta != equal, is_theta, kept)
    assert all(jax.tree.leaves(split)), "Omega moved, or Theta did not"
    assert int(state.step) == 1


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["milora", pytest.param("moelora", marks=pytest.mark.slow)])
def test_routers_have_their_own_multiple_of_the_learning_rate(method):
    """Adam's first update is the learning rate itself, up to the sign: once as far, and ten times."""
    moved = {}
    for factor in (0.0, 1.0, 10.0):
        settings = dataclasses.replace(SETTINGS, router_rate=factor)
        routed = {"load_balance": 0.5, "features": "rms"} if method == "milora" else {}
        state, steps = prepare(settings=settings, method=method, **routed)
        before = jax.tree_util.tree_leaves_with_path(params_of(state))
        for _ in range(2):  # B is zero before the first update, and a router learns through it
            state, _ = steps.train(state, random_base(MODEL), rows())
        after = jax.tree.leaves(params_of(state))
        is_router = jax.tree.leaves(router_mask(state.adapter.method, state.adapter.params))
        is_theta = jax.tree.leaves(theta_mask(state.adapter))
        for (path, old), new, routes, theta in zip(before, after, is_router, is_theta, strict=True):
            if not theta:
                moved.setdefault((routes, jax.tree_util.keystr(path)), []).append(np.abs(new - old).max())
    assert {routes for routes, _ in moved} == {True, False}
    for (routes, path), (never, once, ten) in moved.items():
        assert (never == 0) == routes, path
        assert not routes or 5 * once < ten < 20 * once, path


@pytest.mark.thorough
def test_the_rate_of_theta_is_no_routers_rate():
    def update(factor):
        state, steps = prepare(settings=dataclasses.replace(SETTINGS, router_rate=factor))
        state, _ = steps.coefficients(state, random_base(MODEL), rows())
        return params_of(state).router.numerator

    np.testing.assert_array_equal(update(1.0), update(10.0))


@pytest.mark.thorough
@pytest.mark.parametrize("coefficients", ["joint", "frozen"])
def test_coefficients_may_be_trained_with_the_rest_or_not_at_all(coefficients):
    state, steps = prepare(coefficients=coefficients)
    before = params_of(state)
    for _ in range(2):  # B is zero before the first update, and the router learns through it
        state, _ = steps.train(state, random_base(MODEL), rows())
    moved = bool((before.router.numerator != params_of(state).router.numerator).any())
    assert moved == (coefficients == "joint")


@pytest.mark.thorough
@pytest.mark.parametrize("sizes", [(2, 2, 2)])  # test_meshes.py has all of them
def test_sharded_equals_unsharded(sizes):
    state, steps = prepare(gate="softmax")
    base = random_base(MODEL)
    reference, expected = steps.train(jax.tree.map(jnp.copy, state), base, rows())
    devices = make_mesh(MeshSection(*sizes))
    shardings = state_shardings(devices, jax.eval_shape(lambda: state))
    state = jax.device_put(state, shardings)
    base = jax.device_put(base, base_shardings(devices, base))
    split, metrics = steps.train(state, base, jax.device_put(rows(), batch_sharding(devices)))
    np.testing.assert_allclose(metrics.loss, expected.loss, rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, expected.grad_norm, rtol=1e-4)
    np.testing.assert_array_equal(metrics.expert_share, expected.expert_share)
    # Adam divides by the gradient's own size, so compare the moments, which are linear in it.
    found, wanted = (jax.tree.leaves(s.omega_state) for s in (split, reference))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-3, atol=1e-6)


def test_every_leaf_of_the_base_has_a_declared_sharding():
    mesh = make_mesh(MeshSection(2, 2, 2))
    biased = dataclasses.replace(MODEL, biased=EXPERTS)
    base_shardings(mesh, random_base(biased))
    with pytest.raises(KeyError, match="no sharding is declared for base leaf"):
        base_shardings(mesh, {"layers": {"q": jnp.ones(3)}})


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshSection(3, 1, 1), "does not fit 8 device"),
        (MeshSection(-1, 3, 1), "does not fit 8 device"),
        (MeshSection(16, 1, 1), "does not fit 8 device"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, message):
    with pytest.raises(UserError, match=message):
        make_mesh(mesh)


def test_a_mesh_that_cannot_split_the_model_is_refused():
    with pytest.raises(UserError, match=r"num_kv_heads is 2: expected a multiple of mesh.tensor = 8"):
        check_divides(make_mesh(MeshSection(1, 1, 8)), dataclasses.replace(MODEL, num_heads=8), {})
    with pytest.raises(UserError, match=r"batch_size is 4: expected a multiple of mesh data x fsdp = 8"):
        check_divides(make_mesh(MeshSection(4, 2, 1)), MODEL, {"train.batch_size": 4})


def poisoned(base):
    bad = base.final_norm[...].at[0].set(jnp.nan)
    return type(base)(base.embedding[...], base.layers, bad, base.head[...])


@pytest.mark.thorough
@pytest.mark.parametrize("which", ["train", "coefficients"])
def test_an_update_that_is_not_finite_is_skipped_and_counted(which):
    state, steps = prepare()
    base = random_base(MODEL)
    state, _ = steps.train(state, base, rows())
    before, step = params_of(state), getattr(steps, which)
    opt_state = jax.tree.map(np.asarray, (state.omega_state, state.theta_state))
    for count in (1, 2):
        state, metrics = step(state, poisoned(base), rows())
        assert int(metrics.bad_steps) == (count if which == "train" else 1)
    assert all(jax.tree.leaves(same(before, params_of(state))))
    after = jax.tree.map(np.asarray, (state.omega_state, state.theta_state))
    assert all(jax.tree.leaves(same(opt_state, after)))
    if which == "train":
        state, _ = steps.coefficients(state, base, rows())
        assert int(state.bad_steps) == 2, "a good update of Theta must not hide bad ones of Omega"
    state, metrics = steps.train(state, base, rows())
    assert int(metrics.bad_steps) == 0
    assert not all(jax.tree.leaves(same(before, params_of(state))))


@pytest.mark.thorough
def test_only_response_tokens_count():
    state, steps = prepare()
    base, batch = random_base(MODEL), rows()
    loss, tokens, _ = steps.evaluate(state.adapter, base, batch)
    assert int(tokens) == int(batch.loss_mask.sum())
    from milora_jax.base.transformer import forward, unembed

    hidden = forward(base, MODEL, batch).hidden
    losses = optax.softmax_cross_entropy_with_integer_labels(
        unembed(base, MODEL, hidden)[:, :-1], batch.tokens[:, 1:]
    )
    expected = np.asarray(losses)[np.asarray(batch.loss_mask[:, 1:])].sum()  # a fresh adapter changes nothing
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
