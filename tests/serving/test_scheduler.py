"""The device loop as a state machine: whatever comes in whatever order, every sample ends once, and in turn.

Engine and bank are of paper: they compute nothing and check what they are asked for.
"""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from milora_jax.adapters.inputs import Shape
from milora_jax.adapters.protocol import Adapter
from milora_jax.adapters.registry import build_method
from milora_jax.config import AdapterSection
from milora_jax.errors import UserError
from milora_jax.generation.lengths import bucket_of
from milora_jax.generation.request import Request
from milora_jax.generation.settings import GenerationSettings
from milora_jax.serving import store as store_module
from milora_jax.serving.jobs import Job
from milora_jax.serving.limits import Limits
from milora_jax.serving.loop import DeviceLoop
from milora_jax.serving.store import AdapterStore, Model

ROWS = 3
NAMES = ("a", "b", "c", "d")


class PaperEngine:
    """Batch slots with samples in them, each a token nearer to its end with every step."""

    cache_length = 64
    prefix_cache = None
    config = SimpleNamespace(vocab_size=97)

    def __init__(self):
        self.rows, self.waiting, self.adapters = [None] * ROWS, [], None
        self.begun, self.raises = [], False

    @property
    def free_slots(self):
        return self.rows.count(None) - sum(each.settings.num_samples for each in self.waiting)

    @property
    def idle(self):
        return not self.waiting and not any(self.rows)

    def submit(self, prompt, settings, slot=0, **features):
        if prompt[0] == 99:
            raise UserError("a prompt that cannot be decoded")
        request = Request(tuple(prompt), settings, slot)
        assert self.free_slots >= settings.num_samples, "a batch slot holds one sample"
        self.waiting.append(request)
        self.begun.append(request)
        return request

    def end(self, request, sample, reason):
        if request.finish[sample] is None:
            request.finish[sample] = reason
        self.rows = [None if seat == (request, sample) else seat for seat in self.rows]
        if request.done and request in self.waiting:
            self.waiting.remove(request)

    def step(self):
        if self.raises:
            self.raises = False
            raise RuntimeError("the device is on fire")
        for request in self.waiting:
            for sample, finish in enumerate(request.finish):
                if finish is None:
                    self.rows[self.rows.index(None)] = (request, sample)
        self.waiting = []
        touched = []
        for row, seat in enumerate(self.rows):
            if seat is None:
                continue
            request, sample = seat
            made, most = len(request.tokens[sample]), request.settings.max_new_tokens
            request.tokens[sample] += range(made, min(made + 1 + row, most))
            if len(request.tokens[sample]) == most:
                request.finish[sample] = "length"
                self.rows[row] = None
            touched.append(request)
        return list({id(request): request for request in touched}.values())

    def fail(self):
        failed = {id(seat[0]): seat[0] for seat in self.rows if seat is not None}
        failed |= {id(request): request for request in self.waiting}
        for request in failed.values():
            request.finish = [reason or "error" for reason in request.finish]
        self.rows, self.waiting = [None] * ROWS, []
        return list(failed.values())


class PaperBank:
    """Slots that must not be written while somebody decodes with them."""

    def __init__(self, base, config, like, slots, rank, log):
        self.adapters = SimpleNamespace(method=SimpleNamespace(is_pairs=True))
        self.versions, self.owners = [], {}

    def prepare(self, name, adapter):
        return {"adapter": 0}

    def place(self, prepared, slot):
        before = self.owners.get(slot)
        assert before is None or not before.running, "nobody decodes with what is overwritten"
        self.owners[slot] = next((each for each in self.versions if each.slot == slot), None)


class PaperReader:
    """Reads when it is told to."""

    def __init__(self):
        self.work = []

    def submit(self, what, *given):
        self.work.append(lambda: what(*given))


class Scheduler(RuleBasedStateMachine):
    """Everything that can happen to a loop, in any order."""

    jobs = Bundle("jobs")

    @initialize(slots=st.integers(1, 2))
    def begin(self, slots):
        """A server with two adapters, and room for one or both of them."""
        self.patch = pytest.MonkeyPatch()
        method = build_method(AdapterSection(rank=8))

        def read(path, base, quantize):
            return Adapter({"of": str(path)}, method, Shape((), 1, 8)), {"base_fingerprint": "f"}

        self.patch.setattr(store_module, "read_any_adapter", read)
        self.patch.setattr(store_module, "base_fingerprint", lambda path: "f")
        self.patch.setattr(store_module, "Bank", PaperBank)
        self.patch.setattr(store_module, "rank_of", lambda base, config, adapter, name: 8)
        self.patch.setattr(store_module, "version_of", lambda adapter: adapter.params["of"])
        self.reader = PaperReader()
        model = Model(None, None, None, "none")
        self.store = AdapterStore(model, {"a": Path("a"), "b": Path("b")}, slots, self.reader, host=2)
        self.engine = PaperEngine()
        limits = Limits(rows=ROWS, samples=2, adapters_on_device=slots)
        self.loop = DeviceLoop(self.engine, self.store, limits)
        self.adapters = self.store.bank.versions = self.store.versions()
        self.store.bank.owners = {each.slot: each for each in self.adapters if each.slot is not None}
        self.all, self.heard = [], {}

    def turn(self):
        """What the loop's thread does between two waits; False where it would go on waiting."""
        if not self.loop.has_work:
            return False
        self.loop.turn()
        return True

    @rule(
        target=jobs,
        tenant=st.sampled_from("xyz"),
        name=st.sampled_from((None, *NAMES)),
        samples=st.integers(1, 2),
        tokens=st.integers(1, 9),
        bad=st.integers(0, 20),
    )
    def come(self, tenant, name, samples, tokens, bad):
        """A request comes; of an adapter that is not there none does."""
        adapter = None
        if name is not None:
            adapter = self.store.acquire(name)
            if adapter is None:
                return multiple()
        asked = GenerationSettings(max_new_tokens=tokens, num_samples=samples)
        prompt = (99 if bad == 0 else len(self.all) % 90,)
        job = Job(tenant, adapter, prompt, asked, lambda event: self.heard[id(job)].append(event))
        self.heard[id(job)] = []
        self.all.append(job)
        self.loop.submit(job)
        if adapter is not None:
            self.store.release(adapter)
        return job

    @rule(job=jobs, sample=st.integers(0, 1), reason=st.sampled_from(["stop", "cancelled"]))
    def leave(self, job, sample, reason):
        """Somebody ends a sample, which may have ended already."""
        if sample < job.settings.num_samples:
            self.loop.end(job, sample, reason)

    @rule(name=st.sampled_from(NAMES), pinned=st.booleans())
    def load(self, name, pinned):
        """An adapter comes, or a new version of one."""
        with contextlib.suppress(UserError):  # one slot must not be pinned
            self.adapters.append(self.store.load(name, Path(name), pinned))

    @rule(name=st.sampled_from(NAMES))
    def unload(self, name):
        """An adapter goes."""
        self.store.unload(name)
        self.loop.wake()

    def read(self):
        """What was to be read has been."""
        if self.reader.work:
            self.reader.work.pop(0)()

    @rule()
    def disk(self):
        """The disk has answered."""
        self.read()

    @rule()
    def step(self):
        """The loop does its turn."""
        self.turn()

    @rule()
    def burn(self):
        """The next step raises, if there is one."""
        if not self.engine.idle:
            self.engine.raises = True
            self.turn()

    @invariant()
    def holds_nothing_too_much(self):
        """Counts are never below zero, and a slot has one adapter."""
        assert all(adapter.users >= adapter.running >= 0 for adapter in self.adapters)
        slots = [adapter.slot for adapter in self.adapters if adapter.slot is not None]
        assert len(slots) == len(set(slots))
        assert sum(seat is not None for seat in self.engine.rows) <= ROWS

    def teardown(self):
        """Let it run to its end, and take the papers away even if it did not begin."""
        try:
            self.end()
        finally:
            self.patch.undo()

    def end(self):
        """Every sample has ended once, and everything is given back."""
        self.engine.raises = False
        for _ in range(5000):
            if not (self.turn() or self.reader.work):
                break
            self.read()
        assert self.loop.idle, "nobody waits for ever"
        for job in self.all:
            for sample in range(job.settings.num_samples):
                ends = [n.finish for n in self.heard[id(job)] if n.sample == sample and n.finish]
                assert len(ends) <= 1
                assert ends or job.ended[sample], "one who left while it waited is told nothing"
                tokens = [t for n in self.heard[id(job)] if n.sample == sample for t in n.tokens]
                assert tokens == list(range(len(tokens))), "none is lost, none comes twice"
                if ends == ["length"]:
                    assert len(tokens) == job.settings.max_new_tokens
        begun = {id(request): place for place, request in enumerate(self.engine.begun)}
        for job in self.all:
            alike = [
                other for other in self.all if (other.tenant, other.adapter) == (job.tenant, job.adapter)
            ]
            places = [begun[id(each.request)] for each in alike if each.request is not None]
            assert places == sorted(places), "first come, first served, of one tenant and adapter"
        assert all(adapter.users == adapter.running == 0 for adapter in self.adapters)
        assert all(adapter.slot is None for adapter in self.adapters if adapter.draining)


@pytest.mark.parametrize("slots", [2, 3, 33, 34, 64, 66, 96])
def test_every_length_is_warmed_up(slots):
    engine, asked = PaperEngine(), []
    engine.cache_length = slots
    engine.run, engine.lower_decoding, engine.compile_prefill = (
        lambda: None,
        lambda: [],
        lambda length: False,
    )
    engine.submit = lambda prompt, settings, slot, **_: asked.append((len(prompt), settings.max_new_tokens))
    DeviceLoop(engine, None, Limits(rows=ROWS, samples=2)).warm_up()
    assert all(length >= 1 and length + new <= slots for length, new in asked)
    warm = {bucket_of(length, slots) for length, _ in asked}
    assert warm == {bucket_of(length, slots) for length in range(1, slots)}


def run(examples, steps):
    run_state_machine_as_test(
        Scheduler,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.thorough
def test_whatever_comes_in_whatever_order():
    run(200, 40)


@pytest.mark.slow
def test_whatever_comes_in_whatever_order_for_long():
    run(2000, 50)
