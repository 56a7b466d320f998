"""Prefill block by block, and the prefix cache: the same tokens, bit for bit, and never in anybody's way."""

import jax
import numpy as np
import pytest

from milora_jax.data.batches import collate_prompts
from milora_jax.generation.block_prefill import BlockPrefill, route_layer, run_block
from milora_jax.generation.block_queue import UNHURRIED, BlockQueue
from milora_jax.generation.decode import prefill
from milora_jax.generation.decode_state import empty_state
from milora_jax.generation.prefix_cache import KeptPrefix, PrefixCache
from milora_jax.generation.request import Request
from milora_jax.generation.results import RunningSample, sampler_of
from milora_jax.generation.running_batch import RunningBatch
from milora_jax.generation.settings import GenerationSettings
from milora_jax.model_config import ModelConfig
from tests.adapted import make_adapter, text
from tests.generation.banks import make_bank
from tests.generation.decoding import DECODING, make_engine, one_tenant
from tests.models import TINY

BLOCK, LENGTH, ROW = 8, 96, 1
SLIDING = ModelConfig(**{**vars(TINY), "sliding_window": 11, "sliding_pattern": (True, False)})
METHODS = ("milora", "lora", "dora", "ssp", "parallel_adapter", None)


def adapted(method):
    return None if method is None else one_tenant(make_adapter(seed=3, method=method))


def batch_of(config=TINY, rows=3):
    one = RunningSample.all_of(Request((), GenerationSettings()))
    sizes = config, DECODING.dtype, sampler_of(one, config, True), None, rows, LENGTH, True
    return RunningBatch(lambda: empty_state(*sizes), None)


def rows_of(work):
    """The keys and values of a prompt in its row, by layer."""
    return [jax.tree.map(lambda leaf: leaf[ROW], layer) for layer in work._batch.layers]


def in_blocks(adapters, prompt, config=TINY, **more):
    work = BlockPrefill(DECODING, config, prompt, 0, batch_of(config), ROW, block=BLOCK, **more)
    work.advance(work.slices, adapters)
    return work


def engine_of(adapter=None, **more):
    settings = {
        "prefill_budget": BLOCK,
        "prefix_cache": 2**20,
        "prefill_block": BLOCK,
        "slots": LENGTH,
        **more,
    }
    return make_engine(adapter, **settings)


def run(engine, prompt, scope="a", slot=0, **settings):
    settings = GenerationSettings(**{"max_new_tokens": 6, "ignore_eos": True, "logprobs": 1, **settings})
    request = engine.submit(prompt, settings, slot, cache_scope=scope)
    engine.run()
    return request


def outcome(request):
    return request.tokens, request.logprobs


@pytest.mark.parametrize("whole", [LENGTH, 0], ids=["whole", "in blocks"])
def test_what_an_earlier_request_left_in_a_slot_changes_no_bit(whole, monkeypatch):
    """0 times a value that is not finite is not 0, so what no query sees may not take part in a product."""
    monkeypatch.setattr("milora_jax.base.cache.READ_WHOLE", whole)
    prompt = text(1, 29).tolist()
    expected = outcome(run(engine_of(), prompt))
    assert len(expected[0][0]) == 6
    engine = engine_of()
    layers = engine._batch.state.cache.layers
    engine._batch._put(jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), layers))
    assert outcome(run(engine, prompt)) == expected


@pytest.mark.thorough
@pytest.mark.parametrize("config", [TINY, SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize("method", METHODS)
def test_blocks_equal_the_prefill_of_one_program(method, config):
    prompt, adapters = text(1, 29).tolist(), adapted(method)
    expected, route = prefill(
        DECODING, adapters, np.int32(0), collate_prompts([prompt], 32, 0, rows=1), config, LENGTH
    )
    work = in_blocks(adapters, prompt, config)
    found, weights, _ = work.result()
    np.testing.assert_allclose(found.logits, expected.logits, rtol=2e-5, atol=2e-5)
    for mine, theirs in zip(rows_of(work), expected.cache.layers, strict=True):
        np.testing.assert_allclose(mine.k[:, :29], theirs.k[0, :, :29], rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(mine.v[:, :29], theirs.v[0, :, :29], rtol=2e-5, atol=2e-5)
    assert (found.position, found.cache.length) == (29, 29)
    assert (weights is None) == (route is None)
    if route is not None:
        np.testing.assert_allclose(weights, route.weights[:, :, 0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.sweep("90-milora", "8-lora")
@pytest.mark.parametrize("length", [8, 9, 23, 24, 96 - 6])
def test_a_hit_changes_no_bit(method, length):
    """Of a prompt alone, of its logits and of its keys and values; also at the edges of blocks."""
    prompt, adapters = text(2, length).tolist(), adapted(method)
    fresh = in_blocks(adapters, prompt)
    kept = fresh.to_keep()
    most = (length - 1) // BLOCK
    for blocks in {0, min(1, most), most}:
        again = in_blocks(adapters, prompt, kept=KeptPrefix(kept.blocks[:blocks], kept.route))
        assert again.cached_tokens == blocks * BLOCK
        results = ((each.result(), rows_of(each)) for each in (again, fresh))
        same = jax.tree.map(np.array_equal, *results)
        assert all(jax.tree.leaves(same))


def test_the_routers_read_their_tokens_alone():
    """A later turn leaves the route as it was, and every block before it."""
    adapters, first = adapted("milora"), text(4, 13).tolist()
    longer = [*first, *text(5, 20).tolist()]
    one = in_blocks(adapters, first, route_tokens=13)
    other = in_blocks(adapters, longer, route_tokens=13)
    np.testing.assert_array_equal(one.result()[1], other.result()[1])
    np.testing.assert_array_equal(one.to_keep().blocks[0], other.to_keep().blocks[0])
    whole = [in_blocks(adapters, [*first, *text(seed, 20).tolist()]).result()[1] for seed in range(4)]
    assert any((route != other.result()[1]).any() for route in whole)


@pytest.mark.thorough
def test_turns_of_a_conversation_find_their_beginning():
    engine = engine_of(make_adapter(seed=3, method="lora"))
    alone = engine_of(make_adapter(seed=3, method="lora"), prefix_cache=0)
    chat, before = text(6, 17).tolist(), 0
    for turn in range(3):
        request = run(engine, chat)
        assert request.cached_tokens == before // BLOCK * BLOCK
        assert outcome(request) == outcome(run(alone, chat))
        before = len(chat)
        chat = [*chat, *request.tokens[0], *text(turn, 9).tolist()]


@pytest.mark.thorough
def test_a_whole_prompt_of_a_routed_adapter_is_found_and_no_other():
    engine, prompt = engine_of(make_adapter(seed=3)), text(6, 33).tolist()
    first = run(engine, prompt)
    again = run(engine, prompt)
    longer = run(engine, [*prompt, 5])
    assert (first.cached_tokens, again.cached_tokens, longer.cached_tokens) == (0, 32, 0)
    assert outcome(first) == outcome(again)
    np.testing.assert_array_equal(first.route, again.route)


@pytest.mark.thorough
def test_nothing_is_shared_between_scopes_and_adapters():
    bank, _ = make_bank(method="lora")
    engine, prompt = engine_of(bank.adapters), text(6, 33).tolist()
    cases = [("a", 0), ("b", 0), ("a 2", 1), (None, 0), (None, 0)]
    assert [run(engine, prompt, scope, slot).cached_tokens for scope, slot in cases] == [0] * 5
    assert [run(engine, prompt, scope, slot).cached_tokens for scope, slot in cases] == [32, 32, 32, 0, 0]


def test_memory_is_bounded_and_the_least_recently_used_goes_first():
    block = np.zeros(100, np.uint8)
    cache = PrefixCache(1000, 4)
    prompts = [list(range(i, i + 13)) for i in range(0, 100, 20)]
    for prompt in prompts[:3]:
        cache.keep("a", prompt, 0, KeptPrefix((block,) * 3))
    cache.find("a", prompts[0], 0, routed=False)
    cache.keep("a", prompts[3], 0, KeptPrefix((block,) * 3))
    found = [len(cache.find("a", prompt, 0, routed=False).blocks) for prompt in prompts]
    assert found == [3, 1, 3, 3, 0]  # of the oldest its last blocks have gone
    assert (cache.counts.used, cache.counts.evicted) == (1000, 2)


def test_an_entry_that_does_not_fit_is_not_kept():
    cache = PrefixCache(50, 4)
    cache.keep("a", [1] * 9, 0, KeptPrefix((np.zeros(100, np.uint8),) * 2))
    assert cache.counts.used == 0
    assert cache.find("a", [1] * 9, 0, routed=False) == KeptPrefix()


@pytest.mark.thorough
def test_streams_go_on_while_a_long_prompt_is_prefilled():
    engine = engine_of(make_adapter(seed=3), rows=3, chunk=1, prefix_cache=0)
    stream = engine.submit(text(1, 5).tolist(), GenerationSettings(max_new_tokens=60, ignore_eos=True))
    while not stream.tokens[0]:
        engine.step()
    before = len(stream.tokens[0])
    long = engine.submit(text(2, 80).tolist(), GenerationSettings(max_new_tokens=4, ignore_eos=True))
    short = engine.submit(text(3, 8).tolist(), GenerationSettings(max_new_tokens=4, ignore_eos=True))
    steps = 0
    while not long.tokens[0]:
        engine.step()
        steps += 1
        if short.tokens[0] and not long.tokens[0]:
            overtaken = True
    assert overtaken
    # Ten blocks, one a turn: the stream has got a token in every one of them.
    assert steps >= 10
    assert len(stream.tokens[0]) - before >= steps - 2
    engine.run()
    alone = engine_of(make_adapter(seed=3), prefix_cache=0)
    for request in (stream, long, short):
        settings = {"max_new_tokens": request.settings.max_new_tokens, "logprobs": 0}
        assert run(alone, list(request.prompt), **settings).tokens == request.tokens


@pytest.mark.thorough
@pytest.mark.parametrize("samples", [1, 2])
def test_a_request_that_ends_while_it_is_prefilled_frees_its_slots(samples):
    engine = engine_of(rows=2)
    request = engine.submit(text(2, 80).tolist(), GenerationSettings(max_new_tokens=4, num_samples=samples))
    engine.step()
    assert engine.free_slots == 2 - samples
    for sample in range(samples):
        assert not engine.idle
        engine.end(request, sample, "cancelled")
    assert engine.free_slots == 2
    assert engine.idle
    assert run(engine, text(3, 20).tolist()).finish == ["length"]
    assert not request.tokens[0]


@pytest.mark.thorough
def test_one_sample_of_several_may_end_while_their_prompt_is_prefilled():
    engine = engine_of(rows=2)
    settings = GenerationSettings(max_new_tokens=4, num_samples=2, ignore_eos=True)
    request = engine.submit(text(2, 80).tolist(), settings)
    other = engine.submit(text(3, 8).tolist(), GenerationSettings(max_new_tokens=4, ignore_eos=True))
    engine.step()
    engine.end(request, 0, "cancelled")
    engine.run()
    assert [len(tokens) for tokens in request.tokens] == [0, 4]
    assert other.tokens == run(engine_of(), text(3, 8).tolist(), max_new_tokens=4).tokens


@pytest.mark.thorough
def test_the_oldest_prompt_is_never_put_off():
    """Short prompts that keep coming get half of each turn at most."""
    rows = 4
    queue = BlockQueue(DECODING, TINY, batch_of(rows=rows), 2 * BLOCK, BLOCK)

    def add(length, row):
        request = Request((1,) * length, GenerationSettings())
        return queue.add([RunningSample(request, 0, 1)], [row], routed=False)

    long, turns = add(80, 0), 0
    shorts = [add(8, row) for row in range(1, rows)]
    while long.work.slices:
        done = queue.turn(None, decoding=True)
        shorts += [add(8, prompt.rows[0]) for prompt in done if prompt is not long]
        turns += 1
    assert len(shorts) > rows
    assert turns <= 10  # ten blocks, one a turn


@pytest.mark.thorough
def test_all_prompts_with_a_slot_are_prefilled_as_far_as_the_budget_goes():
    """Or batch slots would decode nothing while prompts wait and the budget of the turn is not used."""
    engine = engine_of(rows=6, prefill_budget=2 * BLOCK)
    asked = [
        engine.submit(text(2 + i, 7).tolist(), GenerationSettings(max_new_tokens=40, ignore_eos=True))
        for i in range(6)
    ]
    assert UNHURRIED * 2 >= 6
    engine.step()
    assert engine.free_slots == 0
    engine.step()
    assert [len(request.tokens[0]) > 0 for request in asked] == [True] * 6
    engine.run()
    alone = engine_of(rows=6)
    for request in asked:
        assert run(alone, list(request.prompt), max_new_tokens=40).tokens == request.tokens


@pytest.mark.parametrize("config", [TINY, SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize("method", ["milora", "lora"])
def test_long_prompts_need_no_programs_but_those_of_their_routes(config, method):
    adapters, batch = adapted(method), batch_of(config)
    base = jax.device_put(DECODING, jax.devices()[0])  # committed to it, as a base that was loaded is
    prompts = {length: text(5, length).tolist() for length in (BLOCK, 16, 32, 64, LENGTH)}

    def work(length):
        return BlockPrefill(base, config, prompts[length], 0, batch, ROW, block=BLOCK)

    def programs():
        return run_block._cache_size(), route_layer._cache_size()

    def run_all(length):
        whole = work(length)
        whole.advance(whole.slices, adapters)

    run_all(BLOCK)
    blocks, _ = programs()
    for length in prompts:
        work(length).compile_route(adapters)
    ready = programs()
    assert ready[0] == blocks
    for length in prompts:
        run_all(length)
    assert programs() == ready


@pytest.mark.thorough
@pytest.mark.parametrize("length", [1, 8, 29, LENGTH])
def test_a_prompt_is_scored_block_by_block_and_finds_nothing(length):
    adapter, prompt = make_adapter(seed=3), text(8, length).tolist()
    settings = {"max_new_tokens": 0, "logprobs": 0, "prompt_logprobs": 2}
    engine = engine_of(adapter)
    found = [run(engine, prompt, **settings) for _ in range(2)]
    expected = run(make_engine(adapter, slots=LENGTH), prompt, scope=None, **settings)
    assert [request.cached_tokens for request in found] == [0, 0]
    assert found[0].prompt_logprobs == found[1].prompt_logprobs
    assert len(found[0].prompt_logprobs) == length - 1
    for mine, theirs in zip(found[0].prompt_logprobs, expected.prompt_logprobs, strict=True):
        assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]
        np.testing.assert_allclose(mine.logprob, theirs.logprob, atol=1e-4)


@pytest.mark.thorough
def test_without_a_budget_a_prompt_is_prefilled_in_one_turn():
    """Also beside streams, who then wait for all of it."""
    engine = engine_of(make_adapter(seed=3), rows=2, chunk=1, prefill_budget=0)
    stream = engine.submit(text(1, 5).tolist(), GenerationSettings(max_new_tokens=60, ignore_eos=True))
    while not stream.tokens[0]:
        engine.step()
    long = engine.submit(text(2, 80).tolist(), GenerationSettings(max_new_tokens=4, ignore_eos=True))
    for _ in range(2):  # one turn that starts all of it, and one that reads its first token
        engine.step()
    assert long.tokens[0]


def test_what_was_found_is_not_cut_out_again():
    fresh = in_blocks(adapted("lora"), text(2, 40).tolist()).to_keep()
    again = in_blocks(adapted("lora"), text(2, 40).tolist(), kept=KeptPrefix(fresh.blocks[:3])).to_keep()
    assert all(mine is theirs for mine, theirs in zip(again.blocks[:3], fresh.blocks[:3], strict=True))
    np.testing.assert_array_equal(again.blocks[3], fresh.blocks[3])
