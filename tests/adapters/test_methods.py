"""What every method must hold, and what makes each of them what it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.adapters.hooks import path_names
from milora_jax.adapters.inputs import ProjectionGroup
from milora_jax.adapters.milora import OF_BATCHES, OF_TRAINING
from milora_jax.adapters.registry import METHOD_CLASSES, METHODS, build_method, full_settings
from milora_jax.base.modules import decode_layout
from milora_jax.base.transformer import adapter_decode_layout, unembed
from milora_jax.config import AdapterSection
from milora_jax.errors import UserError
from milora_jax.training.loss import adapted_loss
from tests.adapted import ANSWER, BASE, PROMPT, make_adapter, row_batch, run, stack, text
from tests.generation.decoding import decoded
from tests.models import TINY
from tests.programs import run_as_users

EXACT = (
    "milora",
    "lora",
    "adalora",
    "moelora",
    "ia3",
    "bitfit",
    "parallel_adapter",
    "learned_adapter",
    "ssp",
)
ROUNDED = ("dora", "midora")
"""Their ratio of magnitude and norm is 1 but for rounding."""
PREFIXED = ("p_tuning_v2", "iapt")
"""A prefix takes attention however it starts."""


def two_rows():
    return stack(row_batch(text(0, PROMPT), text(1, ANSWER)), row_batch(text(2, 3), text(3, 9)))


def logits(adapter, batch, **more):
    return unembed(BASE, TINY, run(adapter, batch, **more).hidden)


@pytest.mark.thorough
@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_adapter_changes_nothing_where_its_definition_allows(method):
    batch = two_rows()
    change = np.abs(logits(make_adapter(method=method, change=False), batch) - logits(None, batch)).max()
    if method in EXACT:
        assert change == 0
    elif method in ROUNDED:
        assert change < 1e-4
    else:
        assert method in PREFIXED
        assert change > 1e-3


@pytest.mark.thorough
@pytest.mark.parametrize("method", METHODS)
def test_scan_equals_loop(method):
    adapter, batch = make_adapter(method=method), two_rows()
    looped = run(adapter_decode_layout(adapter, BASE), batch, base=decode_layout(BASE))
    np.testing.assert_allclose(run(adapter, batch).hidden, looped.hidden, rtol=2e-5, atol=2e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("method", METHODS)
def test_cached_decoding_equals_the_full_forward(method):
    """Greedy tokens of prefill and decode are those of a forward pass over prompt and answer so far."""
    adapter, new = make_adapter(method=method), 6
    prompts = [text(0, 7), text(4, 7)]
    for prompt, answer in zip(prompts, decoded(adapter, prompts, new), strict=True):
        full = logits(adapter, row_batch(prompt, answer, length=16))[0]
        again = np.argmax(full[len(prompt) - 1 : len(prompt) - 1 + len(answer)], axis=-1)
        np.testing.assert_array_equal(answer, again)


@pytest.mark.thorough
@pytest.mark.parametrize("method", METHODS)
def test_packed_equals_unpacked_and_padding_is_nothing(method):
    adapter = make_adapter(method=method)
    records = [(text(i, p), text(10 + i, a)) for i, (p, a) in enumerate([(4, 3), (6, 2), (2, 5)])]
    rows = [row_batch(prompt, answer) for prompt, answer in records]
    packed = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *rows)
    ids = jnp.concatenate([jnp.full_like(row.segment_ids, i + 1) for i, row in enumerate(rows)], axis=1)
    together = run(adapter, packed.replace(segment_ids=ids, prompts=3)).hidden[0]
    start = 0
    for prompt, answer in records:
        length = len(prompt) + len(answer)
        alone = run(adapter, row_batch(prompt, answer, length=12, left=True)).hidden[0, 12 - length :]
        np.testing.assert_allclose(together[start : start + length], alone, rtol=2e-4, atol=2e-4)
        start += length


@pytest.mark.thorough
@pytest.mark.parametrize("method", METHODS)
def test_every_leaf_is_trained(method):
    """From random parameters the loss has a gradient at every leaf but those that decide and are cut."""
    adapter, batch = make_adapter(method=method, coefficients=None), two_rows()

    def loss(params):
        return adapted_loss(adapter.replace(params=params), BASE, TINY, batch, key=None)[0]

    gradient = jax.jit(jax.grad(loss))(adapter.params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert bool(jnp.isfinite(leaf).all()), path
        if METHOD_CLASSES[method].routes and path_names(path)[0] == "experts":
            continue  # an expert that no prompt chose has none
        assert float(jnp.abs(leaf).max()) > 0, path


CHANGES = {
    "rank": 8,
    "alpha": 12.0,
    "use_rslora": True,
    "target_modules": "down_proj,q_proj",
    "top_k": 1,
    "pooler": "last",
    "activation": "relu",
    "features": "raw",
    "gate": "softmax",
    "balance": "bias",
    "num_experts": 2,
    "initial_rank": 5,
    "width": 7,
    "tokens": 2,
}
SEEN_ELSEWHERE = {
    "dropout",
    *OF_TRAINING,
    *OF_BATCHES,
    "orthogonality",
    "prune_start",
    "prune_end",
    "prune_every",
    "sensitivity_decay",
    "spread_decay",
    "search_share",
    "gate_learning_rate",
}
"""Settings that act on training alone or on the tokens of a batch alone, each with a test of its own."""


def settings_of(method):
    return [field.name for field in dataclasses.fields(METHOD_CLASSES[method])]


def test_every_setting_of_every_method_is_tested_and_has_a_place_in_the_config():
    used = {name for method in METHODS for name in settings_of(method)}
    assert CHANGES.keys() | SEEN_ELSEWHERE == used
    assert used | {"method", "normalize"} == {field.name for field in dataclasses.fields(AdapterSection)}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("method", "name"),
    [(method, name) for method in METHODS for name in settings_of(method) if name in CHANGES],
)
def test_every_forward_setting_changes_the_output(method, name):
    value = {"moelora": {"rank": 16}}.get(method, {}).get(name, CHANGES[name])
    batch, common = two_rows(), {"alpha": 12.0} if name == "use_rslora" else {}
    before = run(make_adapter(method=method, **common), batch).hidden
    after = run(make_adapter(method=method, **common, **{name: value}), batch).hidden
    assert float(jnp.abs(before - after).max()) > 1e-6


@pytest.mark.thorough
@pytest.mark.parametrize("method", [name for name in METHODS if "dropout" in settings_of(name)])
def test_dropout_acts_only_with_a_key(method):
    batch = two_rows()
    plain, dropping = make_adapter(method=method, dropout=0.0), make_adapter(method=method, dropout=0.5)
    keyed = {"key": jax.random.key(0)}
    np.testing.assert_array_equal(run(plain, batch).hidden, run(dropping, batch).hidden)
    np.testing.assert_array_equal(run(plain, batch, **keyed).hidden, run(plain, batch).hidden)
    assert float(jnp.abs(run(dropping, batch, **keyed).hidden - run(plain, batch).hidden).max()) > 1e-3
    assert dropping.method.stochastic
    assert not plain.method.stochastic


@pytest.mark.parametrize("method", METHODS)
def test_full_settings_make_the_same_method(method):
    made = build_method(AdapterSection(method=method))
    written = full_settings(made)
    assert build_method(written) == made
    assert all(getattr(written, name) is not None for name in settings_of(method))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "lora", "gate": "softmax"}, "adapter.gate is 'softmax', but method 'lora' has no such"),
        ({"method": "ia3", "rank": 4}, "method 'ia3' has no such setting: it has width"),
        ({"method": "moelora", "rank": 12}, "adapter.rank is 12: expected a multiple of num_experts 8"),
        ({"method": "moelora", "top_k": 9}, "adapter.top_k is 9: expected 1 to num_experts 8"),
        ({"method": "adalora", "initial_rank": 8}, "adapter.initial_rank is 8: expected 0 or at least rank"),
        ({"method": "adalora", "prune_end": 0.05}, "two rising shares"),
        ({"method": "ssp", "search_share": 1.0}, "adapter.search_share is 1.0"),
        ({"method": "iapt", "tokens": 0}, "adapter.tokens is 0: expected at least 1"),
        (
            {"method": "lora", "use_rslora": True},
            "adapter.alpha is 0.0: expected above 0 with adapter.use_rs",
        ),
        ({"method": "ia3", "use_rslora": False}, "method 'ia3' has no such setting: it has width"),
        ({"method": "bitfit", "width": 0}, "adapter.width is 0: expected at least 1"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        build_method(AdapterSection(**settings))


def test_midora_with_seven_experts_is_dora_to_the_bit():
    midora = make_adapter(method="midora", gate="straight_through", top_k=7)
    dora = make_adapter(method="dora").replace(params=midora.params.experts)
    batch = two_rows()
    np.testing.assert_array_equal(run_as_users(midora, batch).hidden, run_as_users(dora, batch).hidden)


@pytest.mark.thorough
def test_moelora_with_one_expert_is_lora_to_the_bit():
    moelora = make_adapter(method="moelora", rank=4, num_experts=1, top_k=1)
    pairs = make_adapter(method="lora", rank=4).params
    pairs = {name: pairs[name].replace(a=mine.a, b=mine.b) for name, mine in moelora.params.items()}
    lora = make_adapter(method="lora", rank=4).replace(params=pairs)
    batch = two_rows()
    np.testing.assert_array_equal(run(moelora, batch).hidden, run(lora, batch).hidden)


@pytest.mark.thorough
def test_the_norms_of_dora_are_those_of_the_whole_weight():
    from milora_jax.adapters.dora import column_norms

    kernel, a, b = (
        jax.random.normal(jax.random.key(i), size) for i, size in enumerate([(9, 5), (9, 3), (3, 5)])
    )
    whole = np.linalg.norm(np.asarray(kernel + 0.7 * a @ b), axis=0)
    np.testing.assert_allclose(column_norms(kernel, a, b, 0.7), whole, rtol=1e-5)


@pytest.mark.thorough
def test_moelora_routes_token_by_token():
    """A token's change depends on that token's input alone, and k of N experts make it."""
    adapter = make_adapter(method="moelora")
    method, layer = adapter.method, jax.tree.map(lambda leaf: leaf[0], adapter.params)
    x = jax.random.normal(jax.random.key(3), (2, 5, TINY.hidden_size))
    zero = jnp.zeros((2, 5, TINY.hidden_size))

    def change(x, params):
        return method.adapt(params, ProjectionGroup(("q",), x, (zero,), (), None, None))[0]

    moved = change(x.at[0, 2].add(1.0), layer) - change(x, layer)
    assert set(zip(*np.nonzero(np.abs(moved).max(axis=-1)), strict=True)) == {(0, 2)}
    width = method.rank // method.num_experts
    in_force = np.zeros((2, 5), int)
    for expert in range(method.num_experts):
        here = slice(expert * width, (expert + 1) * width)
        without = {"q": layer["q"].replace(b=layer["q"].b.at[here].set(0.0))}
        in_force += np.abs(change(x, without) - change(x, layer)).max(axis=-1) > 0
    assert (in_force == method.top_k).all()


@pytest.mark.thorough
def test_iapt_reads_the_prompt_alone_and_p_tuning_nothing():
    batch = row_batch(text(0, PROMPT), text(1, ANSWER))
    other = row_batch(text(5, PROMPT), text(1, ANSWER))
    for method, moves in (("iapt", True), ("p_tuning_v2", False)):
        adapter = make_adapter(method=method)
        layer = jax.tree.map(lambda leaf: leaf[0], adapter.params)

        def keys(batch, adapter=adapter, layer=layer):
            hidden = BASE.embedding[...][batch.tokens]
            members = batch.prompt_mask[:, None, :]
            return adapter.method.prefix(layer, hidden, members, lambda soft: (soft, soft))[0]

        changed = row_batch(text(0, PROMPT), text(7, ANSWER))
        np.testing.assert_allclose(keys(batch), keys(changed), rtol=1e-6)
        assert bool((np.abs(keys(batch) - keys(other)) > 1e-4).any()) == moves
