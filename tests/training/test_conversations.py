"""A conversation as one example: the loss is that of its turns, the route that of prefill at every turn."""

import dataclasses

import jax
import numpy as np
import pytest

from milora_jax.data.batches import collate, collate_prompts
from milora_jax.data.packing import Rows
from milora_jax.data.tokens import Example
from milora_jax.generation.decode import prefill
from milora_jax.training.loss import adapted_loss
from tests.adapted import BASE, make_adapter, run
from tests.generation.decoding import DECODING, one_tenant
from tests.models import TINY

SCOPE, LENGTH = 5, 32
ANSWERS = ((7, 10), (14, 19), (24, 26))
"""Of a conversation of three turns whose first one has five tokens."""


def conversation(seed, scope=SCOPE, answers=ANSWERS):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, TINY.vocab_size, answers[-1][1]).astype(np.int32)
    return Example(tokens, answers[0][0], route_tokens=scope, answers=answers)


def turn(example, number):
    """A turn of it by itself, with all that comes before as its prompt."""
    start, stop = example.answers[number]
    return Example(example.tokens[:stop], start, route_tokens=example.route_tokens)


def batch_of(*rows, length=LENGTH):
    packed = [list(row) for row in rows]
    return jax.tree.map(jax.numpy.asarray, collate(packed, length, len(packed), max(map(len, packed))))


@jax.jit
def loss(adapter, batch):
    return adapted_loss(adapter, BASE, TINY, batch, key=None)[1]


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["milora", "midora"])
def test_the_route_of_prefill_is_the_route_of_training_at_every_turn(method):
    adapter, example = make_adapter(method=method, route_on="first_turn"), conversation(0)
    trained = run(adapter, batch_of([example])).route
    for start, _ in example.answers:
        prompt = example.tokens[:start].tolist()
        batch = collate_prompts([prompt], LENGTH, 0, 1, [SCOPE])
        _, route = prefill(DECODING, one_tenant(adapter), np.int32(0), batch, TINY, LENGTH)
        np.testing.assert_array_equal(route.weights, trained.weights)
        np.testing.assert_allclose(route.probs, trained.probs, rtol=1e-5, atol=1e-7)
        if start == example.prompt_length:
            first = route
        # One program, and the same tokens up to the end of the scope: the same to the bit.
        np.testing.assert_array_equal(route.probs, first.probs)


def test_later_turns_leave_the_route_and_the_first_moves_it():
    adapter = make_adapter(gate="softmax")
    example = conversation(1)
    before = run(adapter, batch_of([example])).route
    later, first = example.tokens.copy(), example.tokens.copy()
    later[SCOPE:] = conversation(2).tokens[SCOPE:]
    first[SCOPE - 1] = (first[SCOPE - 1] + 1) % TINY.vocab_size
    after = run(adapter, batch_of([dataclasses.replace(example, tokens=later)])).route
    np.testing.assert_array_equal(after.probs, before.probs)
    moved = run(adapter, batch_of([dataclasses.replace(example, tokens=first)])).route
    assert float(abs(moved.probs - before.probs).max()) > 1e-6
    whole = run(adapter, batch_of([dataclasses.replace(example, route_tokens=0)])).route
    assert float(abs(whole.weights - before.weights).max()) > 1e-6, "the setting changes the result"


@pytest.mark.thorough
def test_the_loss_of_a_conversation_is_that_of_its_turns():
    adapter, example = make_adapter(), conversation(3)
    whole = loss(adapter, batch_of([example]))
    turns = [loss(adapter, batch_of([turn(example, i)])) for i in range(3)]
    assert int(whole.tokens) == sum(int(each.tokens) for each in turns) == 3 + 5 + 2
    summed = sum(float(each.cross_entropy) * int(each.tokens) for each in turns)
    np.testing.assert_allclose(float(whole.cross_entropy) * int(whole.tokens), summed, rtol=1e-5)


def test_one_turn_without_a_generation_prompt_is_the_loss_of_before_to_the_bit():
    adapter, tokens = make_adapter(), conversation(4).tokens
    whole, scoped = Example(tokens, 9), Example(tokens, 9, route_tokens=9)
    for one, other in zip(
        jax.tree.leaves(loss(adapter, batch_of([whole]))),
        jax.tree.leaves(loss(adapter, batch_of([scoped]))),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.thorough
def test_packed_conversations_are_what_they_are_alone():
    adapter = make_adapter()
    examples = [conversation(5), conversation(6, 2, ((3, 5), (8, 9))), Example(conversation(7).tokens[:8], 6)]
    (row,) = Rows(examples, 64)
    packed, alone = loss(adapter, batch_of(row, length=64)), loss(adapter, batch_of(*[[e] for e in row]))
    assert (
        int(packed.tokens)
        == int(alone.tokens)
        == sum(stop - start for example in examples for start, stop in example.learned)
    )
    np.testing.assert_allclose(packed.cross_entropy, alone.cross_entropy, rtol=1e-5)
    np.testing.assert_array_equal(packed.route.weights[:, 0], alone.route.weights[:, :, 0])
    np.testing.assert_allclose(packed.route.probs[:, 0], alone.route.probs[:, :, 0], rtol=1e-5, atol=1e-7)
