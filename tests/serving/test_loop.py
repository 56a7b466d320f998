"""The device loop: a request's tokens are its own, whoever else is there, comes, leaves or fails."""

import dataclasses
import threading

import jax.numpy as jnp
import numpy as np
import pytest

import milora_jax.generation.engine as engine_module
from milora_jax.generation import results
from milora_jax.generation.settings import GenerationSettings
from milora_jax.serving.metrics import COMPILATIONS, Metrics
from tests.models import WITH_TOKENIZER
from tests.serving.harness import LIMITS, WAIT, Listener, random_request, running, service_of, write_model

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def adapters(folder):
    return write_model(folder)


@pytest.fixture(scope="module")
def service(folder, adapters):
    built, _ = service_of(folder, adapters)
    with running(built):
        yield built


@pytest.fixture(scope="module")
def speculating(folder, adapters):
    built, _ = service_of(folder, adapters, dataclasses.replace(LIMITS, prompt_lookup=3))
    with running(built):
        yield built


def isolated(service, count, seed):
    """Requests alone, and among each other."""
    rng = np.random.default_rng(seed)
    requests = [random_request(rng) for _ in range(count)]

    def outcome(listener):
        return *listener.end(), listener.prompt_logprobs

    alone = [outcome(Listener(service, name, prompt, **more)) for name, prompt, more in requests]
    order = rng.permutation(count)
    listeners = {i: Listener(service, *requests[i][:2], **requests[i][2]) for i in order}
    together = [outcome(listeners[i]) for i in range(count)]
    return alone, together


def test_a_request_is_bit_for_bit_the_same_alone_and_in_company(service):
    alone, together = isolated(service, 40, 0)
    assert alone == together
    assert any(len(logprobs[0]) for _, logprobs, *_ in alone)
    assert any(scores for *_, scores in alone)


@pytest.mark.thorough
def test_the_same_holds_where_texts_propose_their_own_tokens(speculating):
    alone, together = isolated(speculating, 40, 3)
    assert alone == together
    counts = speculating.loop.counts
    assert 0 < counts.accepted_tokens < counts.proposed_tokens
    cache = speculating.engine.prefix_cache.counts
    assert 0 < cache.hits < cache.queries


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["service", "speculating"])
def test_a_thousand_requests_are_the_same_alone_and_in_company(kind, request):
    alone, together = isolated(request.getfixturevalue(kind), 1000, 1)
    assert alone == together


def test_adapters_differ_and_the_base_is_the_plain_model(service, folder):
    prompt = list(range(10, 40))
    found = {name: Listener(service, name, prompt).end()[0][0] for name in ("base", "math", "law", "art")}
    assert len({tuple(tokens) for tokens in found.values()}) == 4
    from milora_jax import load_base
    from milora_jax.data.tokens import load_tokenizer
    from milora_jax.generation.text import generate

    base, config = load_base(folder / "model")
    settings = GenerationSettings(max_new_tokens=6, ignore_eos=True)
    (expected,) = generate(base, config, load_tokenizer(str(folder / "model")), [prompt], settings=settings)
    assert tuple(found["base"]) == expected.tokens


def test_the_route_comes_once_with_the_first_tokens(service):
    listener = Listener(service, "math", range(10, 20))
    listener.end()
    assert listener.route.shape == (WITH_TOKENIZER.num_layers, 7)
    assert ((listener.route > 0).sum(axis=1) <= 3).all()
    alone = Listener(service, "base", range(10, 20))
    alone.end()
    assert alone.route is None


def test_more_adapters_than_the_device_holds_take_turns(service):
    expected = {name: Listener(service, name, [7, 8, 9]).end() for name in ("math", "law", "art")}
    listeners = [(name, Listener(service, name, [7, 8, 9])) for name in ("math", "law", "art") * 5]
    for name, listener in listeners:
        assert listener.end() == expected[name]
    assert len(service.store.on_device()) <= LIMITS.adapters_on_device
    assert all(adapter.users == 0 for adapter in service.store.versions())


def test_one_whose_adapter_finds_no_slot_is_not_passed_over_for_ever(service, monkeypatch):
    monkeypatch.setattr("milora_jax.serving.loop.MAX_OVERTAKES", 3)
    others = [Listener(service, ("math", "law")[i % 2], [i], max_new_tokens=40) for i in range(8)]
    waiting = Listener(service, "art", [9], max_new_tokens=4)
    others += [Listener(service, ("math", "law")[i % 2], [i], max_new_tokens=40) for i in range(40)]
    waiting.end()
    assert sum(other.job.request is None for other in others) > 20
    for other in others:
        other.end()


def test_nothing_is_compiled_after_the_start(service):
    metrics = Metrics()
    COMPILATIONS.add(metrics.compiled)
    rng = np.random.default_rng(5)
    for listener in [Listener(service, n, p, **s) for n, p, s in (random_request(rng) for _ in range(30))]:
        listener.end()
    COMPILATIONS.remove(metrics.compiled)
    assert b"milora_compiled_programs_total 0.0" in metrics.text()


def test_every_sample_has_a_row(service):
    listener = Listener(service, "math", [5, 6], max_new_tokens=40, num_samples=2)
    listener.end()
    assert listener.counted[2].free_slots == service.limits.rows - 2, "after the first token of both"


def test_one_who_leaves_frees_the_row_and_disturbs_nobody(service):
    expected = Listener(service, "law", [5, 6], max_new_tokens=40).end()
    stayed = Listener(service, "law", [5, 6], max_new_tokens=40)
    left = Listener(service, "math", [5], max_new_tokens=90)
    left.events.get(timeout=WAIT)
    before = []
    service.loop.call(lambda: before.append(service.loop.counts.steps))
    service.loop.end(left.job, 0, "cancelled")
    while (event := left.events.get(timeout=WAIT)).finish is None:
        pass
    assert event.finish == "cancelled"
    assert left.counted[-1].steps - before[0] <= 2
    assert stayed.end() == expected
    waiting = [Listener(service, "math", [i], max_new_tokens=40) for i in range(12)]
    for listener in waiting[6:]:
        service.loop.end(listener.job, 0, "cancelled")
    for listener in waiting[:6]:
        listener.end()
    eventually(lambda: service.loop.idle)
    assert all(adapter.users == 0 for adapter in service.store.versions())


def eventually(holds):
    done = threading.Event()
    for _ in range(600):
        if holds():
            return
        done.wait(0.05)
    raise AssertionError("it never came to hold")


def test_a_step_that_fails_ends_those_on_the_device_and_nobody_else(service, monkeypatch):
    expected = Listener(service, "law", [5, 6]).end()
    engine, fail = service.engine, threading.Event()
    step = engine.step

    def failing():
        if fail.is_set():
            fail.clear()
            raise RuntimeError("out of memory at 0x7f00")
        return step()

    monkeypatch.setattr(engine, "step", failing)
    running = [Listener(service, "math", [i], max_new_tokens=80) for i in range(4)]
    for listener in running:
        listener.events.get(timeout=WAIT)
    waiting = [Listener(service, "law", [5, 6]) for _ in range(3)]
    fail.set()
    for listener in running:
        *_, finish = listener.end()
        assert finish == ["error"]
    for listener in waiting:
        assert listener.end() == expected
    assert service.loop.alive
    assert service.loop.counts.failures == 1


def test_logits_that_are_no_numbers_end_their_own_request_alone(service, caplog):
    expected = Listener(service, "law", [5, 6]).end()
    adapter = service.store.acquire("art")
    import jax

    whole = adapter.prepared
    adapter.prepared = jax.tree.map(
        lambda leaf: np.full_like(leaf, np.nan) if np.issubdtype(leaf.dtype, np.floating) else leaf, whole
    )
    service.store.release(adapter)
    if adapter.slot is not None:  # written anew with the next request
        Listener(service, "math", [1]).end(), Listener(service, "law", [1]).end()
    spoilt, healthy = Listener(service, "art", [5, 6]), Listener(service, "law", [5, 6])
    assert spoilt.end()[2] == ["error"]
    assert healthy.end() == expected
    assert [line for line in caplog.messages if "a logit was not finite" in line] == caplog.messages[-1:]
    adapter.prepared = whole
    Listener(service, "math", [1]).end(), Listener(service, "law", [1]).end()
    assert Listener(service, "art", [5, 6]).end()[2] == ["length"]
    assert jnp.isfinite(jnp.asarray(expected[1] or [0])).all()


def test_one_that_is_replaced_or_unloaded_goes_on_for_who_holds_it(service, adapters):
    math, law = (Listener(service, name, [9], max_new_tokens=60).end() for name in ("math", "law"))
    old = Listener(service, "math", [9], max_new_tokens=60)
    old.events.get(timeout=WAIT)
    service.store.load("math", adapters["law"])
    new = Listener(service, "math", [9], max_new_tokens=60)
    assert old.job.adapter is not new.job.adapter
    assert new.end() == law
    old_tokens = old.job.request.tokens
    eventually(lambda: old.job.request.done)
    assert old_tokens == math[0]
    goes = Listener(service, "math", [9], max_new_tokens=60)
    assert service.store.unload("math")
    assert service.store.acquire("math") is None
    assert goes.end() == law
    eventually(lambda: goes.job.adapter.prepared is None)
    service.store.load("math", adapters["math"])
    assert Listener(service, "math", [9], max_new_tokens=60).end() == math


def test_those_that_are_not_in_host_memory_are_read_again(service, folder, adapters):
    expected = Listener(service, "art", [9]).end()
    for name in ("math", "law"):
        Listener(service, name, [9]).end()
    adapter = next(each for each in service.store.versions() if each.name == "art")
    eventually(lambda: adapter.slot is None and adapter.users == 0)
    adapter.prepared = None
    assert Listener(service, "art", [9]).end() == expected
    for name in ("math", "law"):
        Listener(service, name, [9]).end()
    adapter.prepared, adapter.directory = None, folder / "nowhere"
    assert Listener(service, "art", [9]).end()[2] == ["error"]
    service.store.load("art", adapters["art"])
    assert Listener(service, "art", [9]).end() == expected


@pytest.mark.thorough
def test_a_loop_that_stops_tells_everybody(folder, adapters):
    service, _ = service_of(folder, {"math": adapters["math"]})  # the other service's programs serve this one
    service.loop.start()
    listeners = [Listener(service, "math", [i], max_new_tokens=90) for i in range(3 * LIMITS.rows)]
    service.loop.stop()
    for listener in listeners:
        assert listener.end()[2] == ["error"]
    with pytest.raises(RuntimeError, match="has ended"):
        Listener(service, "math", [1])
    assert not service.loop.alive


@pytest.mark.parametrize("where", ["read_results", "admit"])
def test_an_error_that_shows_late_or_early_ends_those_it_concerns_and_nobody_waits(
    service, monkeypatch, where
):
    """When results are fetched, of a request whose row has been given away; and before one has a row."""
    expected = Listener(service, "law", [5, 6]).end()
    module = results if where == "read_results" else engine_module
    real, times = getattr(module, where), iter([True])

    def broken(*given):
        if next(times, False):
            raise RuntimeError("out of memory")
        return real(*given)

    monkeypatch.setattr(module, where, broken)
    lost = Listener(service, "math", [7, 8], max_new_tokens=1)
    assert lost.end()[2] == ["error"]
    monkeypatch.undo()
    eventually(lambda: service.loop.idle)
    assert all(adapter.users == adapter.running == 0 for adapter in service.store.versions())
    assert Listener(service, "law", [5, 6]).end() == expected
