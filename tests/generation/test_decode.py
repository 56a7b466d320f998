"""Decoding: the route is carried, the cache is exact, neighbours do not matter, and the compiled program
holds what it should."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.base.modules import unroll
from milora_jax.base.transformer import adapter_decode_layout, forward, unembed
from milora_jax.data.batches import collate_prompts
from milora_jax.generation import engine as engine_module
from milora_jax.generation.decode import admit, decode_chunk, prefill
from milora_jax.generation.lengths import bucket_of
from milora_jax.generation.sampling import Plan
from milora_jax.generation.settings import GenerationSettings
from milora_jax.types import Batch, stack_layers
from tests.adapted import BASE, make_adapter, row_batch, run, text
from tests.generation.decoding import DECODING, decoded, make_engine, one_tenant
from tests.models import TINY, random_base
from tests.programs import compiled

EMPTY = np.zeros(0, np.int64)
NEW = 12
ENDLESS = dataclasses.replace(TINY, eos_ids=())


def greedy_by_full_forward(prompt, adapter, count):
    """Greedy tokens and their logits, each from a fresh pass over the whole text."""
    tokens, logits = list(prompt), []
    for _ in range(count):
        batch = row_batch(prompt, np.array(tokens[len(prompt) :], np.int64), length=24)
        output = run(adapter, batch)
        logits.append(np.asarray(unembed(BASE, TINY, output.hidden[0, len(tokens) - 1])))
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :], logits


def prefilled(adapter, prompt, slots=32):
    batch = collate_prompts([prompt.tolist()], 16, 0, rows=1)
    return prefill(DECODING, one_tenant(adapter), np.int32(0), batch, TINY, slots)


@jax.jit
def one_step(base, adapter, token, position, route, cache):
    """The forward pass of a decode step."""
    batch = Batch.unpadded(token, position)
    return forward(base, TINY, batch, adapter=adapter, route=route, cache=cache)


@pytest.mark.sweep("milora")
@pytest.mark.parametrize("method", [None, "milora", "lora"])
def test_cached_decode_equals_the_full_forward(method):
    adapter, prompt = None if method is None else make_adapter(method=method), text(0, 9)
    expected, logits = greedy_by_full_forward(prompt, adapter, NEW)
    (found,) = decoded(adapter, [prompt], NEW, ignore_eos=True)
    assert found == expected
    made, _ = prefilled(adapter, prompt)
    np.testing.assert_allclose(made.logits[0], logits[0], rtol=1e-4, atol=1e-4)
    ready = None if adapter is None else adapter_decode_layout(adapter, BASE)
    cache = made.cache
    for step in range(1, 4):
        token = jnp.full((1, 1), expected[step - 1], jnp.int32)
        position = jnp.full((1, 1), 8 + step, jnp.int32)
        output = one_step(DECODING, ready, token, position, made.route, cache)
        cache = output.cache
        np.testing.assert_allclose(
            unembed(BASE, TINY, output.hidden)[0, 0], logits[step], rtol=1e-4, atol=1e-4
        )


@pytest.mark.thorough
def test_joined_layers_equal_separate_ones():
    prompt = row_batch(text(0, 9), EMPTY)
    apart = run(make_adapter_tuple(), prompt, base=unroll(BASE))
    joined = run(adapter_decode_layout(make_adapter(), BASE), prompt, base=DECODING)
    np.testing.assert_allclose(joined.hidden, apart.hidden, rtol=1e-5, atol=1e-5)


def make_adapter_tuple():
    adapter = make_adapter()
    return adapter.replace(
        params=tuple(jax.tree.map(lambda leaf, i=i: leaf[i], adapter.params) for i in range(TINY.num_layers))
    )


def test_the_route_of_prefill_is_the_route_of_training_and_never_changes():
    adapter, prompt = make_adapter(), text(3, 8)
    trained = run(adapter, row_batch(prompt, text(4, 6))).route
    _, route = prefilled(adapter, prompt)
    np.testing.assert_array_equal(route.weights != 0, trained.weights != 0)
    np.testing.assert_allclose(route.probs, trained.probs, rtol=1e-5, atol=1e-7)
    engine = make_engine(adapter, rows=1, slots=32)
    engine.submit(prompt.tolist(), GenerationSettings(max_new_tokens=20, ignore_eos=True))
    engine.step()
    before = np.stack(engine._batch.state.route)
    np.testing.assert_array_equal(before[:, 0], route.weights[:, 0])
    engine.step()
    np.testing.assert_array_equal(np.stack(engine._batch.state.route), before)


def test_padding_of_a_prompt_does_not_change_its_route_or_its_logits():
    adapter, prompt = make_adapter(), text(3, 8)
    short, route = prefilled(adapter, prompt)
    wide = collate_prompts([prompt.tolist()], 30, 0, rows=1)
    long, again = prefill(DECODING, one_tenant(adapter), np.int32(0), wide, TINY, 32)
    np.testing.assert_array_equal(route.weights != 0, again.weights != 0)
    np.testing.assert_allclose(short.logits, long.logits, rtol=1e-4, atol=1e-5)


def test_a_prompt_in_pieces_is_refused():
    """A route is chosen from the whole prompt: a second piece cannot choose again."""
    made, _ = prefilled(make_adapter(), text(3, 8))
    batch = row_batch(text(4, 4), EMPTY)
    with pytest.raises(ValueError, match="with that pass's route"):
        run(make_adapter(), batch, cache=made.cache)


@pytest.mark.thorough
def test_a_row_that_stopped_gives_nothing_more():
    prompts = [text(20 + i, 6) for i in range(6)]
    first, _ = greedy_by_full_forward(prompts[0], None, 4)
    config = dataclasses.replace(TINY, eos_ids=(first[2],))
    found = decoded(None, prompts, NEW, config)
    assert found[0] == first[: first.index(first[2]) + 1]
    endless = decoded(None, prompts, NEW, ENDLESS)
    for mine, whole in zip(found, endless, strict=True):
        assert mine == (whole[: whole.index(first[2]) + 1] if first[2] in whole else whole)


@pytest.mark.thorough
@pytest.mark.parametrize("count", [1, 2, 16, 17, 18, 33])
def test_any_number_of_new_tokens(count):
    prompt = text(0, 4)
    (longest,) = decoded(make_adapter(), [prompt], 40, ENDLESS)
    (tokens,) = decoded(make_adapter(), [prompt], count, ENDLESS)
    assert tokens == longest[:count]


@pytest.mark.thorough
def test_more_prompts_than_rows_and_rows_that_are_used_again():
    prompts = [text(i, 3 + i) for i in range(7)]
    engine = make_engine(make_adapter(), ENDLESS, rows=2, slots=64)
    made = [
        engine.submit(prompt.tolist(), GenerationSettings(max_new_tokens=5 + 7 * i))
        for i, prompt in enumerate(prompts)
    ]
    engine.run()
    assert engine.idle
    for i, (prompt, request) in enumerate(zip(prompts, made, strict=True)):
        assert request.tokens[0] == decoded(make_adapter(), [prompt], 5 + 7 * i, ENDLESS)[0]
        assert request.finish == ["length"]


@pytest.mark.thorough
def test_scan_equals_loop_with_a_cache():
    adapter, prompt = make_adapter(), text(0, 6)
    made, _ = prefilled(adapter, prompt, 18)
    token, position = jnp.full((1, 1), 5, jnp.int32), jnp.full((1, 1), 6, jnp.int32)
    ready = adapter_decode_layout(adapter, BASE)
    looped = one_step(DECODING, ready, token, position, made.route, made.cache)
    stacked = made.cache.replace(layers=stack_layers(made.cache.layers))
    scanned = one_step(random_base(TINY), adapter, token, position, jnp.stack(made.route), stacked)
    np.testing.assert_allclose(scanned.hidden, looped.hidden, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        scanned.cache.layers.k, np.stack([c.k for c in looped.cache.layers]), atol=1e-6
    )


def compiled_chunk(adapter, rows, plan=None):
    """The optimised program of a chunk, and the cache shape of a layer."""
    engine = make_engine(adapter, rows=rows, slots=48)
    lowered = decode_chunk.lower(DECODING, engine.adapters, engine._batch.state, TINY, 16, plan or Plan())
    return compiled(lowered).as_text()


@pytest.mark.sweep("8")
@pytest.mark.parametrize("rows", [1, 8])
def test_the_decode_program_holds_no_router_no_conditional_and_no_copy_of_the_cache(rows):
    program = compiled_chunk(make_adapter(), rows)
    batch = collate_prompts([text(0, 6).tolist()], 16, 0, rows=1)
    routing = compiled(prefill.lower(DECODING, one_tenant(make_adapter()), np.int32(0), batch, TINY, 40))

    assert "/route/" in routing.as_text()
    assert re.search(r" sort\(", routing.as_text()), "the choice of k"
    assert "/route/" not in program
    assert not re.search(r" sort\(", program)
    assert " conditional(" not in program
    assert "/attention/" in program
    cache = {f"{rows},2,48,8", f"{rows * 2},48,8", "2,48,8", f"{rows},48,2,8"}
    moved = [shape for shape, _ in re.findall(r"= f32\[([\d,]+)\]\S* (copy|transpose)\(", program)]
    assert not cache & set(moved), "the cache is copied in a decode step"


def dots(program):
    """Matrix products of a program, those inside library fusions included."""
    return len(re.findall(r" dot\(", program))


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["lora", "milora", "moelora", "dora", "midora"])
def test_few_more_products_than_the_base(method):
    """At most 8 per layer; MOELoRA's own routers, which run at every token, come on top."""
    more = dots(compiled_chunk(make_adapter(method=method), 3)) - dots(compiled_chunk(None, 3))
    routers = 4 if method == "moelora" else 0
    assert 0 < more <= (8 + routers) * TINY.num_layers


@pytest.mark.sweep("milora-False")
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("method", [None, "milora", "lora"])
def test_a_long_cache_of_which_little_is_written_gives_the_same_tokens(method, blocks):
    """Attention reads it block by block (``base.cache.read_block``), and a short one at once."""
    adapter = None if method is None else make_adapter(method=method)
    prompts = [text(seed, length).tolist() for seed, length in enumerate((3, 40, 17))]
    settings = GenerationSettings(max_new_tokens=30, ignore_eos=True, logprobs=1)
    found = []
    for positions in (96, 640):
        long = dataclasses.replace(TINY, max_positions=640)
        engine = make_engine(adapter, long, rows=2, slots=positions, prefill_budget=64 if blocks else 0)
        assert (engine._batch.state.cache.block > 0) == (positions > 96)
        requests = [engine.submit(prompt, settings) for prompt in prompts]
        engine.run()
        found.append(requests)
    for short, long in zip(*found, strict=True):
        assert short.tokens == long.tokens
        pairs = zip(short.logprobs[0], long.logprobs[0], strict=True)
        assert max(abs(mine.logprob - theirs.logprob) for mine, theirs in pairs) < 1e-4


def test_a_row_that_nobody_holds_is_done_on_the_device():
    """Or its text would go on, and the others would read as far as it has written."""
    engine = make_engine(rows=2, chunk=2)
    settings = GenerationSettings(max_new_tokens=40, ignore_eos=True)
    stopped, other = engine.submit([5, 6], settings), engine.submit([7, 8], settings)
    while not stopped.tokens[0]:
        engine.step()
    engine.end(stopped, 0, "stop")
    engine.step()
    np.testing.assert_array_equal(engine._batch.state.done, [True, False])
    engine.run()
    assert other.tokens[0] == decoded(None, [[7, 8]], 40, ignore_eos=True)[0]


def test_decode_steps_that_were_compiled_beforehand_are_not_compiled_again(caplog):
    base = jax.device_put(DECODING, jax.devices()[0])
    engine = engine_module.Engine(base, TINY, batch_slots=5, cache_length=70, plans=(Plan(),))
    for program in engine.lower_decoding():
        program.compile()
    engine.submit([5, 6], GenerationSettings(max_new_tokens=9, ignore_eos=True))
    with jax.log_compiles():
        engine.run()
    assert "jit(admit)" in caplog.text
    assert "jit(decode_chunk)" not in caplog.text


@pytest.mark.thorough
def test_one_trace_per_bucket():
    before = prefill._cache_size(), admit._cache_size(), decode_chunk._cache_size()
    engine = make_engine(make_adapter(), rows=3, slots=100)
    for seed, length in enumerate((5, 9, 31, 40, 60, 12)):
        engine.submit(text(seed, length).tolist(), GenerationSettings(max_new_tokens=9 + seed))
    engine.run()
    lengths = {bucket_of(n, 100) for n in (5, 9, 31, 40, 60, 12)}
    after = prefill._cache_size(), admit._cache_size(), decode_chunk._cache_size()
    assert [b - a for a, b in zip(before, after, strict=True)] == [len(lengths), 1, 1]


@pytest.mark.thorough
def test_a_row_is_given_away_while_its_last_tokens_are_computed(monkeypatch):
    """Two chunks do for three prompts, two of which share a row: nobody waits for a look at the first."""
    chunks = []

    def counted(*given):
        chunks.append(1)
        return decode_chunk(*given)

    monkeypatch.setattr(engine_module, "decode_chunk", counted)
    engine = make_engine(rows=2, chunk=4)
    prompts, lengths = ([5, 6], [7, 8, 9], [10]), (5, 9, 5)
    made = [
        engine.submit(prompt, GenerationSettings(max_new_tokens=new, ignore_eos=True))
        for prompt, new in zip(prompts, lengths, strict=True)
    ]
    engine.run()
    assert len(chunks) == 2
    for request, prompt, new in zip(made, prompts, lengths, strict=True):
        assert request.tokens[0] == decoded(None, [prompt], new, ignore_eos=True)[0]
