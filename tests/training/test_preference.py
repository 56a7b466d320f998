"""Preference objectives: the formulas in numpy, the whole program from plain logits, one route for a pair."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.base.transformer import unembed
from milora_jax.config import TrainSection
from milora_jax.data.batches import collate
from milora_jax.data.packing import Rows
from milora_jax.data.tokens import Example
from milora_jax.errors import UserError
from milora_jax.training import preference
from milora_jax.training.preference import objective_of, preference_figures, preference_loss
from milora_jax.training.step import init_state, make_steps
from tests.adapted import BASE, make_adapter, run
from tests.models import TINY

RNG = np.random.default_rng(7)


def drawn(scale):
    return jnp.asarray(RNG.normal(0, scale, 6), jnp.float32)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-np.asarray(x, np.float64)))


def test_dpo_is_the_logarithm_of_a_sigmoid_smoothed():
    margin = drawn(3)
    for smoothing in (0.0, 0.2):
        expected = -(1 - smoothing) * np.log(sigmoid(0.3 * margin)) - smoothing * np.log(
            sigmoid(-0.3 * margin)
        )
        np.testing.assert_allclose(preference.dpo(margin, 0.3, smoothing), expected, rtol=1e-5)


def test_ipo_is_the_square_about_half_of_one_over_tau():
    margin = drawn(1)
    np.testing.assert_allclose(preference.ipo(margin, 0.2), (margin - 2.5) ** 2, rtol=1e-5)


@pytest.mark.thorough
def test_orpo_is_the_logarithm_of_the_odds_ratio_and_finite_for_certain_answers():
    chosen, rejected = -jnp.asarray(RNG.uniform(0.01, 3, (2, 6)), jnp.float32)
    p, q = np.exp(chosen), np.exp(rejected)
    expected = -0.5 * np.log(sigmoid(np.log(p / (1 - p)) - np.log(q / (1 - q))))
    np.testing.assert_allclose(preference.orpo(chosen, rejected, 0.5), expected, rtol=2e-5)
    value, slope = jax.value_and_grad(lambda x: preference.orpo(x, x - 1.0, 0.5))(jnp.zeros(()))
    assert np.isfinite([value, slope]).all()


def test_kto_pulls_desirable_answers_up_and_others_down():
    ratio, label = drawn(3), jnp.asarray([True, False, True, False, True, False])
    expected = np.where(label, 1 - sigmoid(0.3 * (ratio - 0.7)), 1 - sigmoid(0.3 * (0.7 - ratio)))
    np.testing.assert_allclose(preference.kto(ratio, label, jnp.asarray(0.7), 0.3), expected, rtol=1e-5)


LENGTHS = [(4, 3, 5), (6, 2, 1), (2, 5, 4), (5, 1, 3)]


def make_examples():
    """Two answers to each of four prompts, and labels for kto."""
    rng, found = np.random.default_rng(3), []
    for number, (prompt, *answers) in enumerate(LENGTHS):
        asked = rng.integers(3, TINY.vocab_size, prompt)
        for place, length in enumerate(answers):
            tokens = np.concatenate([asked, rng.integers(3, TINY.vocab_size, length)]).astype(np.int32)
            found.append(Example(tokens, prompt, label=place == 0 and number % 2 == 0))
    return found


EXAMPLES = make_examples()


def batch_of(capacity=None, rows=4):
    """The pairs, two in a row where ``capacity`` has room for them."""
    packed = Rows(EXAMPLES, capacity, 2)
    batch = collate(packed, 24, rows, packed.prompts, answers=2)
    return jax.tree.map(jnp.asarray, batch)


def alone(example):
    """A batch of one answer, padded so that all are one program."""
    return jax.tree.map(jnp.asarray, collate([[example]], 16, 1))


def plain_logps(adapter):
    """Log-probabilities of each token of each answer, ``[example][token]``, each in a row of its own."""
    found = []
    for example in EXAMPLES:
        hidden = run(adapter, alone(example)).hidden
        logits = np.asarray(unembed(BASE, TINY, hidden)[0], np.float64)
        logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        found.append(logps[np.arange(len(example.tokens) - 1), example.tokens[1:]])
    return found


def expected_loss(settings, adapter, reference):
    """The objective's value and figures, in numpy from the logits of answers in rows of their own."""
    policy, still = plain_logps(adapter), plain_logps(reference)
    answers = [slice(example.prompt_length - 1, None) for example in EXAMPLES]
    own = np.array([logps[part].sum() for logps, part in zip(policy, answers, strict=True)]).reshape(-1, 2)
    base = np.array([logps[part].sum() for logps, part in zip(still, answers, strict=True)]).reshape(-1, 2)
    tokens = np.array([len(logps[part]) for logps, part in zip(policy, answers, strict=True)]).reshape(-1, 2)
    ratios, beta = own - base, settings.beta
    if settings.objective == "orpo":
        p = np.exp(own / tokens)
        odds = np.log(p / (1 - p))
        nll = -np.concatenate(policy[::2]).mean()
        return nll - beta * np.log(sigmoid(odds[:, 0] - odds[:, 1])).mean(), {
            "rewards/chosen": beta * (own / tokens)[:, 0].mean()
        }
    if settings.objective == "ipo":
        averages = ratios / tokens
        value = (averages[:, 0] - averages[:, 1] - 1 / (2 * beta)) ** 2
    elif settings.objective == "dpo":
        margin, smoothing = beta * (ratios[:, 0] - ratios[:, 1]), settings.label_smoothing
        value = -(1 - smoothing) * np.log(sigmoid(margin)) - smoothing * np.log(sigmoid(-margin))
    else:
        labels, kl = np.array([example.label for example in EXAMPLES[::2]]), max(ratios[:, 1].mean(), 0)
        value = 1 - sigmoid(beta * np.where(labels, ratios[:, 0] - kl, kl - ratios[:, 0]))
        return value.mean(), {
            "rewards/chosen": beta * ratios[labels, 0].mean(),
            "rewards/rejected": beta * ratios[~labels, 0].mean(),
            "rewards/accuracies": ((ratios[:, 0] > kl) == labels).mean(),
            "kl": kl,
        }
    return value.mean(), {
        "rewards/chosen": beta * ratios[:, 0].mean(),
        "rewards/rejected": beta * ratios[:, 1].mean(),
        "rewards/margins": beta * (ratios[:, 0] - ratios[:, 1]).mean(),
        "rewards/accuracies": (ratios[:, 0] > ratios[:, 1]).mean(),
    }


OBJECTIVES = ("dpo", "ipo", "orpo", "kto")


def settings_of(objective, **more):
    smoothing = 0.1 if objective == "dpo" else 0.0
    return TrainSection(objective=objective, beta=0.4, label_smoothing=smoothing, loss_chunk=20, **more)


@pytest.mark.thorough
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_program_is_the_formula_of_plain_logits(objective):
    settings = settings_of(objective)
    adapter, first = make_adapter(load_balance=0.0), make_adapter(5)
    batch = batch_of(rows=5)  # a filler row counts nowhere
    for reference in (None, first):
        program = jax.jit(
            lambda adapter, reference: preference_loss(
                adapter, BASE, TINY, batch, settings=settings, key=None, reference=reference
            )
        )
        loss, parts = program(adapter, reference)
        expected, figures = expected_loss(settings, adapter, reference)
        np.testing.assert_allclose(loss, expected, rtol=2e-5)
        np.testing.assert_allclose(objective_of(parts.preference, objective), expected, rtol=2e-5)
        found = preference_figures(parts.preference, objective)
        for name, value in figures.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def update(objective, capacity, accumulate, **adapter_settings):
    settings = settings_of(objective, accumulate=accumulate, learning_rate=1e-2)
    adapter = make_adapter(**{"load_balance": 0.01, **adapter_settings})
    state = init_state(adapter, jax.random.key(1), settings, 10)
    steps = make_steps(TINY, settings, 10)
    state, metrics = steps.train(state, BASE, batch_of(capacity))
    state, theta = steps.coefficients(state, BASE, batch_of(capacity))
    return state.adapter.params, metrics, theta


@pytest.mark.thorough
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("capacity", "accumulate"), [(24, 1), (None, 2), (24, 2)])
def test_packing_and_accumulation_change_nothing(objective, capacity, accumulate):
    whole, parts = update(objective, None, 1), update(objective, capacity, accumulate)
    for one, other in zip(whole, parts, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), one, other)
    assert float(whole[1].grad_norm) > 0
    assert float(whole[2].grad_norm) > 0


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["iapt", "p_tuning_v2", "moelora", "dora", "adalora", "midora"])
def test_every_kind_of_method_takes_pairs(method):
    one, other = (update("dpo", capacity, 1, method=method, load_balance=None) for capacity in (None, 24))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), one[0], other[0])
    assert float(one[1].grad_norm) > 0


@pytest.mark.thorough
def test_both_answers_have_the_route_of_their_prompt():
    """Dropout would give each copy of the prompt a route of its own; the row has one."""
    adapter = make_adapter()
    route = run(adapter, batch_of()).route
    assert route.weights.shape == (TINY.num_layers, 4, 1, 7)
    for number, example in enumerate(EXAMPLES):
        own = run(adapter, alone(example)).route
        np.testing.assert_allclose(route.probs[:, number // 2], own.probs[:, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objective": "ppo"}, "train.objective is 'ppo': expected one of sft, dpo, ipo, orpo, kto"),
        ({"objective": "dpo", "beta": 0.0}, "train.beta is 0.0: expected above 0"),
        ({"beta": 0.2}, "train.beta is 0.2: expected its default: objective 'sft' does not read it"),
        ({"objective": "ipo", "neftune_alpha": 5.0}, "train.neftune_alpha is 5.0: expected 0 with objective"),
        ({"objective": "dpo", "label_smoothing": 0.5}, "train.label_smoothing is 0.5: expected from 0 to"),
        ({"objective": "ipo", "label_smoothing": 0.1}, "train.label_smoothing is 0.1: expected 0, objective"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises(UserError) as caught:
        TrainSection(**values)
    assert message in str(caught.value)


@pytest.mark.thorough
def test_figures_of_a_batch_without_desirable_answers_are_none():
    batch = dataclasses.replace(batch_of(), labels=jnp.zeros((4, 1), bool))
    settings = settings_of("kto")
    _, parts = preference_loss(make_adapter(), BASE, TINY, batch, settings=settings, key=None)
    found = preference_figures(parts.preference, "kto")
    assert found["rewards/chosen"] is None
    assert found["rewards/margins"] is None
    assert np.isfinite(found["rewards/rejected"])
