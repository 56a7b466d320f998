"""The paper's claims as equalities, on a small random model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.base.modules import decode_layout
from milora_jax.base.transformer import adapter_decode_layout, forward, unembed
from milora_jax.config import GATES, POOLERS
from milora_jax.training.loss import adapted_loss
from milora_jax.types import Batch
from tests.adapted import ANSWER, BASE, PROMPT, make_adapter, row_batch, run, stack, text
from tests.models import TINY


@pytest.mark.parametrize("settings", [{"gate": gate} for gate in GATES])
def test_a_fresh_adapter_changes_no_logit(settings):
    batch = row_batch(text(0, PROMPT), text(1, ANSWER))
    adapted = unembed(BASE, TINY, run(make_adapter(change=False, **settings), batch).hidden)
    np.testing.assert_array_equal(adapted, unembed(BASE, TINY, run(None, batch).hidden))


@pytest.mark.parametrize("pooler", POOLERS)
@pytest.mark.parametrize("change", ["answer", "no answer", "right padding", "left padding", "other rows"])
def test_the_route_depends_on_the_prompt_alone(pooler, change):
    adapter = make_adapter(pooler=pooler)
    prompt = text(0, PROMPT)
    reference = run(adapter, row_batch(prompt, text(1, ANSWER))).route
    batch = {
        "answer": row_batch(prompt, text(2, ANSWER)),
        "no answer": row_batch(prompt, text(2, 0)),
        "right padding": row_batch(prompt, text(1, ANSWER), length=20),
        "left padding": row_batch(prompt, text(1, ANSWER), length=20, left=True),
        "other rows": stack(
            row_batch(prompt, text(1, ANSWER)),
            row_batch(text(5, PROMPT - 2), text(6, ANSWER + 2)),
            row_batch(text(7, 2), text(8, PROMPT + ANSWER - 2)),
        ),
    }[change]
    found = run(adapter, batch).route
    np.testing.assert_array_equal(found.weights[:, 0] != 0, reference.weights[:, 0] != 0)
    np.testing.assert_allclose(found.probs[:, 0], reference.probs[:, 0], rtol=1e-5, atol=1e-7)


def test_a_route_moves_with_the_prompt():
    adapter = make_adapter()
    routes = [np.asarray(run(adapter, row_batch(text(s, 9), text(1, 2))).route.weights) for s in range(8)]
    assert len({(route != 0).tobytes() for route in routes}) > 1


@pytest.mark.thorough
@pytest.mark.parametrize(("gate", "top_k"), [*((gate, 3) for gate in GATES), (GATES[0], 1), (GATES[0], 6)])
def test_unchosen_experts_get_no_gradient(gate, top_k):
    adapter = make_adapter(gate=gate, top_k=top_k)
    batch = row_batch(text(0, PROMPT), text(1, ANSWER))
    chosen = np.asarray(run(adapter, batch).route.weights)[:, 0, 0] != 0
    assert (chosen.sum(-1) == top_k).all()

    def loss(params):
        new = adapter.replace(params=params)
        return adapted_loss(new, BASE, TINY, batch, key=None)[0]

    gradient = jax.jit(jax.grad(loss))(adapter.params)
    for i, name in enumerate(gradient.experts):
        for leaf in (gradient.experts[name].a, gradient.experts[name].b):
            reached = np.abs(np.asarray(leaf)).max(axis=(1, 2)) > 0
            column = ("q", "k", "v", "o", "gate", "up", "down").index(name)
            np.testing.assert_array_equal(reached, chosen[:, column], err_msg=f"{name} {i}")


def test_seven_experts_with_weight_one_are_plain_lora_to_the_bit():
    milora = make_adapter(gate="straight_through", top_k=7)
    lora = make_adapter(method="lora").replace(params=milora.params.experts)
    batch = row_batch(text(0, PROMPT), text(1, ANSWER))
    np.testing.assert_array_equal(run(milora, batch).hidden, run(lora, batch).hidden)


def test_scan_equals_loop():
    adapter = make_adapter()
    batch = stack(row_batch(text(0, PROMPT), text(1, ANSWER)), row_batch(text(2, 3), text(3, 9)))
    scanned = run(adapter, batch)
    looped = run(adapter_decode_layout(adapter, BASE), batch, base=decode_layout(BASE))
    np.testing.assert_allclose(scanned.hidden, looped.hidden, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(scanned.route.weights, looped.route.weights)


def test_a_given_route_equals_the_computed_one():
    adapter = make_adapter(gate="softmax")
    batch = row_batch(text(0, PROMPT), text(1, ANSWER))
    routed = run(adapter, batch)
    given = run(adapter, batch, route=routed.route.weights)
    assert given.route is None
    np.testing.assert_allclose(given.hidden, routed.hidden, rtol=1e-6, atol=1e-6)


@pytest.mark.thorough
def test_a_pass_with_a_cache_needs_the_route_of_the_one_before():
    adapter, prompt = make_adapter(), row_batch(text(0, PROMPT), text(1, 0))
    adapter, base = adapter_decode_layout(adapter, BASE), decode_layout(BASE)
    first = forward(base, TINY, prompt, adapter=adapter, cache_length=PROMPT + 1)
    step = Batch.unpadded(jnp.ones((1, 1), jnp.int32), jnp.full((1, 1), PROMPT, jnp.int32))
    with pytest.raises(ValueError, match="continues a pass with that pass's route"):
        forward(base, TINY, step, adapter=adapter, cache=first.cache)
    with pytest.raises(ValueError, match="neither inspect nor cache_length"):
        forward(base, TINY, step, cache=first.cache, cache_length=PROMPT + 1)


@pytest.mark.thorough
@pytest.mark.parametrize("pooler", POOLERS)
@pytest.mark.parametrize(("features", "rtol"), [("rms", 1e-5), ("standardized", 1e-4)])
def test_packed_equals_unpacked(pooler, features, rtol):
    """Standardized features are over a deviation, here a random one, and so is their rounding."""
    adapter = make_adapter(pooler=pooler, gate="softmax", features=features)
    lengths = [(4, 3), (6, 2), (2, 5)]
    records = [(text(i, p), text(10 + i, a)) for i, (p, a) in enumerate(lengths)]
    apart = stack(*(row_batch(prompt, answer, length=12) for prompt, answer in records))
    rows = [row_batch(prompt, answer) for prompt, answer in records]
    packed = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *rows)
    ids = jnp.concatenate([jnp.full_like(row.segment_ids, i + 1) for i, row in enumerate(rows)], axis=1)
    packed = packed.replace(segment_ids=ids, prompts=3)

    one_route, many_route = run(adapter, packed).route, run(adapter, apart).route
    np.testing.assert_allclose(one_route.weights[:, 0], many_route.weights[:, :, 0], rtol=rtol, atol=1e-6)
    if pooler != "attention":  # the others differ in the route alone
        return

    def loss(params, batch):
        new = adapter.replace(params=params)
        return adapted_loss(new, BASE, TINY, batch, key=None)

    value_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (one, one_parts), one_grads = value_and_grad(adapter.params, packed)
    (many, many_parts), many_grads = value_and_grad(adapter.params, apart)
    np.testing.assert_allclose(one, many, rtol=1e-5)
    np.testing.assert_allclose(one_parts.load_balance, many_parts.load_balance, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one_grads, many_grads)
