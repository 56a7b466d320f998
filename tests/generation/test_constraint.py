"""Constraints: a sample gets allowed tokens alone, and its neighbours those that they get without it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.generation.constraint import AnyToken, full_masks
from milora_jax.generation.decode import decode_chunk, decode_logits, decode_masked
from milora_jax.generation.sampling import Plan, choose, make_sampler
from milora_jax.generation.settings import GenerationSettings
from tests.adapted import make_adapter, text
from tests.generation.constraints import SETS, Steps, packed
from tests.generation.decoding import make_engine
from tests.models import TINY

(END,) = TINY.eos_ids


KINDS = (
    {},
    {"temperature": 1.2},
    {"temperature": 1.3, "top_p": 0.8, "top_k": 20},
    {"repetition_penalty": 1.4, "presence_penalty": 0.5},
    {"temperature": 0.9, "min_p": 0.05, "presence_penalty": 0.7, "logprobs": 3},
    {"logprobs": 5},
)


def requests(engine, constraints):
    """One request of every kind, some of them with a constraint."""
    made = []
    for i, kind in enumerate(KINDS):
        settings = GenerationSettings(max_new_tokens=9, ignore_eos=True, seed=i, **kind)
        made.append(engine.submit(text(i, 5 + i).tolist(), settings, constraint=constraints.get(i)))
    engine.run()
    return made


@pytest.mark.thorough
@pytest.mark.parametrize("method", [None, "milora"])
def test_tokens_are_allowed_and_neighbours_unchanged(method):
    adapter = None if method is None else make_adapter(method=method)
    alone = requests(make_engine(adapter, rows=6, chunk=4), {})
    constrained = {1: Steps(SETS), 4: Steps(SETS)}
    together = requests(make_engine(adapter, rows=6, chunk=4), constrained)
    for i, (one, other) in enumerate(zip(alone, together, strict=True)):
        if i in constrained:
            allowed = [*SETS, *([{END}] * 4)]
            assert all(token in some for token, some in zip(other.tokens[0], allowed, strict=True))
        else:
            assert one.tokens == other.tokens
            assert one.logprobs == other.logprobs


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_a_complete_text_ends(kind):
    engine = make_engine(rows=3)
    settings = GenerationSettings(max_new_tokens=20, num_samples=2, **kind)
    constraint = Steps(SETS)
    request = engine.submit(text(0, 6).tolist(), settings, constraint=constraint)
    neighbour = engine.submit(text(1, 6).tolist(), GenerationSettings(max_new_tokens=30, ignore_eos=True))
    engine.run()
    assert request.finish == ["stop", "stop"]
    for sample in request.tokens:
        assert len(sample) == len(SETS) + 1
        assert sample[-1] == END
    assert all(each.done for each in request.constraints)
    assert not constraint.taken, "each sample has a copy"
    assert len(neighbour.tokens[0]) == 30


@pytest.mark.thorough
def test_a_full_mask_changes_nothing_at_all():
    free = requests(make_engine(rows=3), {})
    masked = requests(make_engine(rows=3), dict.fromkeys(range(6), AnyToken(TINY.vocab_size)))
    assert [r.tokens for r in free] == [r.tokens for r in masked]
    assert [r.logprobs for r in free] == [r.logprobs for r in masked]


@pytest.mark.thorough
@pytest.mark.parametrize(
    "constraint", [Steps(SETS, fails_at=0), Steps(SETS, fails_at=2), Steps(SETS, accepts=False)]
)
def test_a_constraint_that_fails_ends_its_own_request_alone(constraint):
    alone, together = (requests(make_engine(rows=6), given) for given in ({}, {2: constraint}))
    assert together[2].finish == ["constraint"]
    assert together[2].failure in ("too complex", "not accepted")
    for i in (0, 1, 3, 4, 5):
        assert (together[i].tokens, together[i].finish) == (alone[i].tokens, alone[i].finish)


@pytest.mark.thorough
def test_a_batch_without_constraints_runs_the_chunk_program_alone():
    engine = make_engine(rows=2, chunk=4, plans=(Plan(True, True, True, True),))
    settings = GenerationSettings(max_new_tokens=9)
    engine.submit(text(0, 5).tolist(), settings, constraint=Steps(SETS))
    engine.run()
    engine.submit(text(0, 5).tolist(), dataclasses.replace(settings, ignore_eos=True))
    engine.run()
    programs = (decode_logits, decode_masked, decode_chunk)
    before = [program._cache_size() for program in programs]
    for constraint in (None, Steps(SETS), None):
        engine.submit(text(1, 5).tolist(), settings, constraint=constraint)
        engine.run()
    assert [program._cache_size() for program in programs] == before
    import milora_jax.generation.engine as module

    def never(*_, **__):
        raise AssertionError("no constraint is there")

    kept = module.decode_logits
    module.decode_logits = never
    try:
        engine.submit(text(1, 5).tolist(), settings)
        engine.run()
    finally:
        module.decode_logits = kept


@pytest.mark.thorough
def test_constrained_requests_come_and_go_among_others():
    """A batch goes from chunks to single steps and back, and no sample notices."""

    def run(constrained):
        engine = make_engine(rows=2, chunk=4)
        made = []
        for i in range(9):
            new = (3, 17, 8)[i % 3]
            settings = GenerationSettings(
                max_new_tokens=new, ignore_eos=i % 2 == 0, temperature=1.0, seed=i, num_samples=1 + i % 2
            )
            constraint = Steps(SETS) if constrained and i % 3 == 1 else None
            made.append(engine.submit(text(i, 5).tolist(), settings, constraint=constraint))
        engine.run()
        return made

    for i, (one, other) in enumerate(zip(run(False), run(True), strict=True)):
        assert i % 3 == 1 or (one.tokens, one.finish) == (other.tokens, other.finish)


@pytest.mark.thorough
def test_masks_go_before_penalties_and_limits():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, TINY.vocab_size)), jnp.float32)
    best = int(logits.argmax())
    allowed = [token for token in range(TINY.vocab_size) if token != best]
    for kind in KINDS:
        sampler = make_sampler(
            [GenerationSettings(**kind)], [0], [[1, 2]], TINY.eos_ids, TINY.vocab_size, True
        )
        sampler = jax.tree.map(jnp.asarray, sampler)
        plan = Plan.of([GenerationSettings(**kind)])
        position = jnp.array([3])
        found = choose(logits, sampler, position, plan, jnp.asarray(packed(allowed)[None]))
        assert int(found.token[0]) != best
        one = choose(logits, sampler, position, plan, jnp.asarray(packed([11])[None]))
        assert int(one.token[0]) == 11
        assert bool(one.finite[0])
        free = choose(logits, sampler, position, plan)
        full = choose(logits, sampler, position, plan, jnp.asarray(full_masks(1, TINY.vocab_size)))
        assert int(free.token[0]) == int(full.token[0])
