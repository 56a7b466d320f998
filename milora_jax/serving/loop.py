"""The device loop: the scheduler, and the one thread that starts steps and distributes their tokens.

Other threads put commands into its queue, which it empties between two steps; it calls a job's ``on_event``
with the tokens, which must not block. It handles no text, HTTP or files.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from milora_jax.errors import UserError
from milora_jax.generation.constraint import AnyToken, Constraint
from milora_jax.generation.engine import Engine
from milora_jax.generation.lengths import bucket_of
from milora_jax.generation.request import Request
from milora_jax.generation.sampling import Plan
from milora_jax.generation.settings import GenerationSettings
from milora_jax.serving.api_errors import log_error
from milora_jax.serving.fair_queue import FairQueue
from milora_jax.serving.jobs import Job, StreamEvent
from milora_jax.serving.limits import Limits
from milora_jax.serving.store import BASE_SLOT, AdapterStore

log = logging.getLogger("milora_jax.serving")

MAX_OVERTAKES = 32
"""Requests that may start before one whose adapter finds no adapter slot; then a slot is kept for it."""

PLANS = (Plan(), Plan(sampled=True, limited=True), Plan(True, True, True, True))
"""The decode programs of a server: greedy, sampled, and with every feature that a request can ask for."""


@dataclass
class Counts:
    """Counters of the loop and its free batch slots; the loop alone writes them, other threads read them."""

    steps: int = 0
    failures: int = 0
    free_slots: int = 0
    proposed_tokens: int = 0
    accepted_tokens: int = 0
    last_step: float = field(default_factory=time.monotonic)


class DeviceLoop:
    """The thread that owns an engine.

    Args:
      engine: made with :data:`PLANS`.
      store: adapters; None to serve the base alone.
    """

    def __init__(self, engine: Engine, store: AdapterStore | None, limits: Limits) -> None:
        self._engine, self._store, self._limits = engine, store, limits
        self._commands: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._queue: FairQueue[Job] = FairQueue()
        self._next: Job | None = None  # waits for as many batch slots as it has samples
        self._overtaken: Job | None = None  # waits for an adapter slot, which no other job may take
        self._running: dict[Request, Job] = {}
        self._started = 0
        self._stopping = self._blocked = False
        self.counts = Counts(free_slots=engine.free_slots)
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job, whose adapter the caller holds.

        Raises:
          RuntimeError: the loop has ended.
        """
        with self._changed:
            if self._stopping:
                raise RuntimeError("the device loop has ended")
            if self._store is not None and job.adapter is not None:
                self._store.retain(job.adapter)
            self._commands.append(lambda: self._enqueue(job))
            self._changed.notify()

    def end(self, job: Job, sample: int, reason: str) -> None:
        """End a sample at its stop string ("stop"), or because its client has disconnected ("cancelled")."""
        self.call(lambda: self._end(job, sample, reason))

    def wake(self) -> None:
        """Schedule again, because resources that queued jobs wait for may be available."""
        self.call(lambda: None)

    def call(self, command: Callable[[], None]) -> None:
        """Run a command in the thread of the loop, between two steps."""
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    def stop(self) -> None:
        """End all jobs and the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def idle(self) -> bool:
        """Whether no job is queued or running."""
        with self._changed:
            return not (self._commands or self._queue or self._next or self._running)

    @property
    def running(self) -> int:
        """Number of requests in the batch."""
        return len(self._running)

    @property
    def alive(self) -> bool:
        """Whether the thread runs and, if there is work, ended a step recently."""
        recent = time.monotonic() - self.counts.last_step < self._limits.stalled_seconds
        return self._thread.is_alive() and (recent or self.idle)

    def warm_up(self, decoding: Sequence[Future[Any]] = ()) -> None:
        """Compile every program that requests need; call it before :meth:`start`.

        Args:
          decoding: results of compiling what :meth:`Engine.lower_decoding` gives, which other threads are
            about; empty to compile that here.
        """
        engine, limits = self._engine, self._limits
        longest = engine.cache_length - 1  # one cache position is for the first new token
        buckets, length = {}, 1
        while length <= longest:
            buckets[bucket_of(length, engine.cache_length)] = length
            length = length + 1 if length == longest else min(2 * length, longest)
        scored = GenerationSettings(max_new_tokens=0, prompt_logprobs=1)
        shortest, *longer = buckets.values()
        self._compile([0] * shortest, scored)
        for length in longer:
            if not engine.compile_prefill(length):
                self._compile([0] * length, scored)
        if engine.prefix_cache is not None:
            prompt = [0] * min(engine.prefix_cache.block + 1, longest)
            for _ in range(2):  # once to keep a block, and once to find it
                self._compile(prompt, GenerationSettings(max_new_tokens=1, ignore_eos=True), "")
            engine.prefix_cache.clear()
        for plan in PLANS:
            self._compile([0], _settings_for(plan, 1, 1))
        if limits.most_samples > 1:
            self._compile([0], _settings_for(PLANS[0], 2, 1))
        for compiled in decoding:
            compiled.result()
        if not decoding:
            for program in engine.lower_decoding():
                program.compile()
        constraint = AnyToken(engine.config.vocab_size)
        for plan in PLANS:
            self._compile([0], _settings_for(plan, 1, min(2, longest)), constraint=constraint)

    def _compile(
        self,
        prompt: Sequence[int],
        settings: GenerationSettings,
        cache_scope: str | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        self._engine.submit(prompt, settings, 0, cache_scope=cache_scope, constraint=constraint)
        self._engine.run()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self.turn()
        except BaseException as error:  # log it: the thread must not end silently
            self.error = error
            log_error("the device loop ended", error)
        finally:
            with self._changed:
                self._stopping = True
                commands, self._commands = self._commands, deque()
            for command in commands:
                command()
            for job in [*self._running.values(), *self._queue.drain(), *([self._next] if self._next else [])]:
                self._fail(job)

    @property
    def has_work(self) -> bool:
        """Whether a turn would do something."""
        waiting = self._next is not None or len(self._queue) > 0
        return bool(self._commands) or not self._engine.idle or (waiting and not self._blocked)

    def turn(self) -> None:
        """Run the commands of other threads, start queued jobs in free batch slots, and run a step."""
        with self._changed:
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()
        self._fill_slots()
        self._step()
        self.counts.free_slots = self._engine.free_slots
        self.counts.last_step = time.monotonic()

    def _wait_for_work(self) -> bool:
        """False when the loop stops."""
        with self._changed:
            while not (self._stopping or self.has_work):
                self._changed.wait()
                self.counts.last_step = time.monotonic()  # an idle loop is not a stalled one
            return not self._stopping

    def _enqueue(self, job: Job) -> None:
        job.started_before = self._started
        self._queue.push(job.tenant, job.cost, job)

    def _fill_slots(self) -> None:
        """Start jobs while batch slots are free."""
        self._blocked = False
        while self._engine.free_slots > 0:
            job = self._next or self._queue.pop(self._can_start)
            self._next = None
            if job is None:
                # Only a command changes that: an adapter has been read, or a job has been queued.
                self._blocked = True
                return
            if job.settings.num_samples > self._engine.free_slots:
                self._next = job  # keep the next slots for it, or jobs of fewer samples would starve it
                return
            self._start(job)

    def _can_start(self, job: Job) -> bool:
        if self._store is None or job.adapter is None:
            return True
        available = self._store.slot_available(job.adapter, self.wake)
        overtaken = self._started - job.started_before > MAX_OVERTAKES
        if not available and job.adapter.prepared is not None and overtaken:
            self._overtaken = self._overtaken or job
        return available and self._overtaken in (None, job)

    def _start(self, job: Job) -> None:
        self._started += 1
        if self._overtaken is job:
            self._overtaken = None
        try:
            slot = BASE_SLOT
            if self._store is not None and job.adapter is not None:
                if job.adapter.failed:
                    raise UserError(job.adapter.failed)
                slot = self._store.acquire_slot(job.adapter)
                self._engine.adapters = self._store.bank.adapters
                job.has_slot = True
            job.request = self._engine.submit(
                job.prompt,
                job.settings,
                slot,
                cache_scope=job.cache_scope,
                route_tokens=job.route_tokens,
                constraint=job.constraint,
            )
        except UserError as error:
            log.warning("a request could not be started: %s", error)
            self._fail(job)
            return
        except Exception as error:
            log_error("a request could not be started", error)
            self._fail(job)
            return
        self._running[job.request] = job

    def _step(self) -> None:
        if self._engine.idle:
            return
        try:
            touched = self._engine.step()
        except Exception as error:
            # Requests on the device are lost with its state, whatever the error was; queued ones are not.
            log_error("a step failed", error)
            self.counts.failures += 1
            touched = self._engine.fail()
        else:
            for request in touched:
                if request.done and "error" in request.finish:
                    log.warning("a request ended with an error: a logit was not finite")
        self.counts.steps += 1
        for request in touched:
            job = self._running.get(request)
            if job is not None:
                self._publish(job)

    def _publish(self, job: Job) -> None:
        """Send the new tokens of a job, and release it when it is done."""
        request = job.request
        if request is None:
            return
        for sample, finish in enumerate(request.finish):
            first = job.sent[sample]
            tokens = tuple(request.tokens[sample][first:])
            if job.ended[sample] or not (tokens or finish):
                continue
            # The base alone has no router: what its slot of zeros chose has no meaning.
            route = request.route if first == 0 and job.adapter is not None else None
            prompt_logprobs = request.prompt_logprobs if first == 0 else ()
            logprobs = tuple(request.logprobs[sample][first:])
            job.sent[sample] += len(tokens)
            job.ended[sample] = finish is not None
            cached, failure = request.cached_tokens, request.failure
            self._send(
                job,
                StreamEvent(sample, tokens, logprobs, finish, route, cached, failure, prompt_logprobs),
            )
        if request.done:
            if self._running.pop(request, None) is not None:
                self.counts.proposed_tokens += request.proposed_tokens
                self.counts.accepted_tokens += request.accepted_tokens
            self._release(job)

    def _fail(self, job: Job) -> None:
        """End all samples of a job with an error."""
        for sample, ended in enumerate(job.ended):
            if not ended:
                job.ended[sample] = True
                self._send(job, StreamEvent(sample, (), (), "error"))
        if job.request is not None:
            self._running.pop(job.request, None)
        self._release(job)

    def _send(self, job: Job, event: StreamEvent) -> None:
        try:
            job.on_event(event)
        except Exception as error:  # the listener is gone
            log_error("a stream event could not be delivered", error)

    def _release(self, job: Job) -> None:
        if self._store is not None and job.adapter is not None and not job.released:
            if job.has_slot:
                self._store.release_slot(job.adapter)
            self._store.release(job.adapter)
        job.released = True
        self._blocked = False  # another job may have waited for its adapter slot

    def _end(self, job: Job, sample: int, reason: str) -> None:
        if job.request is not None:
            self._engine.end(job.request, sample, reason)
            self._publish(job)
            return
        job.ended[sample] = True
        if all(job.ended):
            waited = self._queue.remove(job.tenant, job)
            if self._next is job:
                self._next = None
                waited = True
            if self._overtaken is job:
                self._overtaken = None
            if waited:
                self._release(job)


def _settings_for(plan: Plan, samples: int, new: int) -> GenerationSettings:
    """Settings that need a plan."""
    return GenerationSettings(
        max_new_tokens=new,
        ignore_eos=True,
        temperature=1.0 if plan.sampled else 0.0,
        top_p=0.9 if plan.limited else 1.0,
        presence_penalty=0.5 if plan.penalized else 0.0,
        logprobs=1 if plan.logprobs else 0,
        num_samples=samples,
    )
