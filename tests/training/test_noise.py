"""NEFTune's noise: how large it is, where it is, and that routers, dev rows and resumed runs know nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.base.transformer import forward
from milora_jax.training.loss import adapted_loss
from milora_jax.training.noise import NOISE, embedding_noise
from tests.adapted import BASE, make_adapter, row_batch, stack, text
from tests.models import TINY, random_base
from tests.training.steps import MODEL, SETTINGS, params_of, prepare, rows

ALPHA = 5.0
NOISY = dataclasses.replace(SETTINGS, neftune_alpha=ALPHA)


def two_rows():
    return stack(row_batch(text(0, 7), text(1, 5), length=16), row_batch(text(2, 4), text(3, 12)))


def packed():
    """A row of two records of 5 and 8 tokens and 3 of padding."""
    one, two = row_batch(text(0, 3), text(1, 2)), row_batch(text(2, 4), text(3, 4), length=11)
    both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), one, two)
    ids = jnp.concatenate([one.segment_ids, 2 * two.segment_ids], axis=1)
    return both.replace(segment_ids=ids, prompts=2)


@pytest.mark.thorough
def test_the_noise_is_uniform_and_as_large_as_the_example_is_long():
    width, key = 4096, jax.random.key(0)
    noise = np.asarray(embedding_noise(packed(), width, ALPHA, key))
    drawn = jax.random.uniform(jax.random.fold_in(key, NOISE), (1, 16, width), minval=-1.0, maxval=1.0)
    bounds = [ALPHA / np.sqrt(length * width) for length in [5] * 5 + [8] * 8]
    np.testing.assert_allclose(noise[0, :13], np.array(bounds)[:, None] * drawn[0, :13], rtol=1e-5)
    np.testing.assert_array_equal(noise[0, 13:], 0.0)
    for start, end in ((0, 5), (5, 13)):  # the paper's scale: the norm is the same at any length
        norm = np.linalg.norm(noise[0, start:end])
        np.testing.assert_allclose(norm, ALPHA / np.sqrt(3), rtol=0.02)
    assert abs(noise[0, :13].mean()) < 1e-3


@pytest.mark.thorough
def test_the_noise_is_added_to_the_embeddings():
    batch = two_rows()
    noise = embedding_noise(batch, TINY.hidden_size, ALPHA, jax.random.key(0))
    embedded = BASE.embedding[...][batch.tokens] + noise
    found = forward(BASE, TINY, batch, noise=noise).hidden
    vectors = dataclasses.replace(TINY, vocab_size=embedded[..., 0].size)
    other = jax.tree.map(lambda leaf: leaf, BASE)
    other.embedding = type(BASE.embedding)(embedded.reshape(-1, TINY.hidden_size))
    tokens = jnp.arange(vectors.vocab_size, dtype=jnp.int32).reshape(batch.tokens.shape)
    expected = forward(other, vectors, batch.replace(tokens=tokens)).hidden
    np.testing.assert_array_equal(found, expected)


def parts_of(adapter, alpha=ALPHA, key=0):
    batch, key = two_rows(), jax.random.key(key)

    @jax.jit
    def compute(adapter):
        return adapted_loss(adapter, BASE, TINY, batch, key=key, neftune_alpha=alpha)

    return compute(adapter)


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["milora", pytest.param("midora", marks=pytest.mark.thorough)])
def test_no_router_reads_the_noise(method):
    adapter, batch = make_adapter(method=method), two_rows()
    clean = jax.jit(lambda adapter: forward(BASE, TINY, batch, adapter=adapter).route)(adapter)
    value, parts = parts_of(adapter)
    other, _ = parts_of(adapter, key=1)
    assert float(value) != float(other)
    np.testing.assert_allclose(parts.route.probs, clean.probs, rtol=1e-6)
    np.testing.assert_array_equal(parts.route.weights != 0, clean.weights != 0)
    noise = embedding_noise(batch, TINY.hidden_size, ALPHA, jax.random.key(0))
    noised = forward(BASE, TINY, batch, adapter=adapter, noise=noise).route
    assert float(jnp.abs(noised.probs - clean.probs).max()) > 1e-3, "it would reach them in one pass"


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["milora", pytest.param("lora", marks=pytest.mark.thorough)])
def test_two_passes_have_the_gradient_of_one(method):
    """With all but no noise, the gradient through the pass that routes and the one that does not."""
    adapter, batch = make_adapter(method=method), two_rows()

    def gradient(params, alpha):
        def loss(params):
            new, key = dataclasses.replace(adapter, params=params), jax.random.key(0)
            return adapted_loss(new, BASE, TINY, batch, key=key, neftune_alpha=alpha)[0]

        return jax.grad(loss)(params)

    gradients = [jax.jit(gradient, static_argnums=1)(adapter.params, alpha) for alpha in (0.0, 1e-9)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), *gradients)


def test_without_the_setting_nothing_is_drawn():
    adapter, batch = make_adapter(method="lora"), two_rows()

    def program(alpha):
        return str(
            jax.make_jaxpr(
                lambda key: adapted_loss(adapter, BASE, TINY, batch, key=key, neftune_alpha=alpha)[0]
            )(jax.random.key(0))
        )

    assert "random" not in program(0.0)
    assert "random" in program(ALPHA)


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["lora", "milora"])
def test_steps_draw_their_own_noise_and_evaluation_none(method):
    base = random_base(MODEL)
    state, steps = prepare(settings=NOISY, method=method)
    _, plain = prepare(method=method)
    for made in ("evaluate", "coefficients") if method == "milora" else ("evaluate",):
        copies = [jax.tree.map(jnp.copy, state) for _ in range(2)]
        starts = [each.adapter if made == "evaluate" else each for each in copies]
        found = [getattr(p, made)(s, base, rows()) for p, s in zip((steps, plain), starts, strict=True)]
        found = [jax.tree.leaves(each) if made == "evaluate" else params_of(each[0]) for each in found]
        jax.tree.map(np.testing.assert_array_equal, *found)
    losses, states = [], []
    for _ in range(2):  # from the same parameters: only the number of the step differs
        at = dataclasses.replace(jax.tree.map(jnp.copy, state), step=jnp.asarray(len(losses), jnp.int32))
        new, metrics = steps.train(at, base, rows())
        losses.append(float(metrics.loss))
        states.append(params_of(new))
    assert losses[0] != losses[1]
    again, _ = steps.train(dataclasses.replace(state, step=jnp.asarray(1, jnp.int32)), base, rows())
    jax.tree.map(np.testing.assert_array_equal, params_of(again), states[1])


@pytest.mark.thorough
@pytest.mark.parametrize("more", [{"accumulate": 2}, {"remat": "full"}])
def test_noise_goes_with_parts_and_recomputation(more):
    state, steps = prepare(settings=dataclasses.replace(NOISY, **more), dropout=0.1)
    for _ in range(2):
        state, metrics = steps.train(state, random_base(MODEL), rows())
    assert np.isfinite(float(metrics.loss))
    if "remat" in more:
        plain, steps = prepare(settings=NOISY, dropout=0.1)
        for _ in range(2):
            plain, other = steps.train(plain, random_base(MODEL), rows())
        np.testing.assert_allclose(metrics.loss, other.loss, rtol=1e-5)
