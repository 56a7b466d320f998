"""The device loop: one thread that does nothing but start steps and hand out what they gave.

Other threads put jobs, cancellations and writes of the bank into its mailbox, which it empties between two
steps; it tells them what came by calling a job's ``sink``, which must not wait. Text, HTTP and files are
not its business.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from milora_jax.errors import UserError
from milora_jax.generation.engine import Engine, bucket_of
from milora_jax.generation.request import Request, TokenLogprobs
from milora_jax.generation.sampling import Plan
from milora_jax.generation.settings import GenerationSettings
from milora_jax.serving.fair_queue import FairQueue
from milora_jax.serving.limits import Limits
from milora_jax.serving.store import BASE_SLOT, AdapterStore, Entry
from milora_jax.serving.trace import log_error

log = logging.getLogger("milora_jax.serving")

PATIENCE = 32
"""Requests that are begun before one whose adapter finds no slot; then a slot is left to become free."""

PLANS = (Plan(), Plan(sampled=True, limited=True), Plan(True, True, True, True))
"""The decode programs of a server: greedy; whatever samples; and all that can be asked for."""


@dataclass(frozen=True)
class News:
    """What became of one sample of a job since the last news.

    Attributes:
      tokens: new ones.
      logprobs: of them, where asked for.
      finish: why it ended, as ``generation.request.Request.finish`` says; None while it goes on.
      route: routing weights ``[L, E]`` of the prompt, with the first news.
    """

    sample: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish: str | None
    route: np.ndarray | None = None


@dataclass(eq=False)
class Job:
    """A request on its way.

    Attributes:
      tenant: whose turn it takes.
      entry: the adapter that it holds; None is the base alone.
      sink: takes its news; must not wait.
      queued: how many jobs the loop had begun when this one came.
    """

    tenant: str
    entry: Entry | None
    prompt: tuple[int, ...]
    settings: GenerationSettings
    sink: Callable[[News], object]
    request: Request | None = None
    told: list[int] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)
    seated: bool = False
    released: bool = False
    queued: int = 0

    def __post_init__(self) -> None:
        self.told = [0] * self.settings.num_samples
        self.ended = [False] * self.settings.num_samples

    @property
    def cost(self) -> int:
        """Tokens that it may take."""
        return len(self.prompt) + self.settings.max_new_tokens * self.settings.num_samples


@dataclass
class Counts:
    """What a loop has done, and the rows that are free; read by other threads, written by the loop alone."""

    steps: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    failures: int = 0
    free_slots: int = 0
    last: float = field(default_factory=time.monotonic)


class DeviceLoop:
    """The thread that owns an engine.

    Args:
      engine: made with :data:`PLANS`.
      store: of the adapters; None serves the base alone.
    """

    def __init__(self, engine: Engine, store: AdapterStore | None, limits: Limits) -> None:
        self._engine, self._store, self._limits = engine, store, limits
        self._mail: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._queue: FairQueue[Job] = FairQueue()
        self._held: Job | None = None
        self._starving: Job | None = None
        self._running: dict[Request, Job] = {}
        self._begun = 0
        self._stopping = self._blocked = False
        self.counts = Counts(free_slots=engine.free_slots)
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job, which holds its adapter; its sink hears of it from now on.

        Raises:
          RuntimeError: the loop has ended.
        """
        with self._wake:
            if self._stopping:
                raise RuntimeError("the device loop has ended")
            if self._store is not None and job.entry is not None:
                self._store.hold_again(job.entry)
            self._mail.append(lambda: self._line_up(job))
            self._wake.notify()

    def end(self, job: Job, sample: int, reason: str) -> None:
        """End a sample: its stop string came ("stop"), or nobody wants it any more ("cancelled")."""
        self._post(lambda: self._end(job, sample, reason))

    def poke(self) -> None:
        """Look again at who waits: what they waited for may be there."""
        self._post(lambda: None)

    def stop(self) -> None:
        """End all that is under way, and the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        with self._wake:
            return not (self._mail or self._queue or self._held or self._running)

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    @property
    def alive(self) -> bool:
        """Whether the thread runs, and ended a step not long ago if there is work."""
        recent = time.monotonic() - self.counts.last < self._limits.stalled_seconds
        return self._thread.is_alive() and (recent or self.idle)

    def warm_up(self) -> None:
        """Compile every program that requests will need; before :meth:`start`."""
        engine, limits = self._engine, self._limits
        longest = engine.slots - 1  # one place is for what comes
        buckets, length = {}, 1
        while length <= longest:
            buckets[bucket_of(length, engine.slots)] = length
            length = length + 1 if length == longest else min(2 * length, longest)
        for length in buckets.values():
            self._try([0] * length, GenerationSettings(max_new_tokens=1, ignore_eos=True))
        samples = range(1, limits.most_samples + 1)
        for number, plan in itertools.product(samples, PLANS):
            self._try([0], _settings_for(plan, number, min(2, longest)))

    def _try(self, prompt: Sequence[int], settings: GenerationSettings) -> None:
        self._engine.submit(prompt, settings, 0)
        self._engine.run()

    def _post(self, letter: Callable[[], None]) -> None:
        with self._wake:
            self._mail.append(letter)
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._open_mail():
                self._fill()
                self._step()
                self.counts.free_slots = self._engine.free_slots
                self.counts.last = time.monotonic()
        except BaseException as error:  # the thread must not die in silence
            self.error = error
            log_error("the device loop ended", error)
        finally:
            with self._wake:
                self._stopping = True
                mail, self._mail = self._mail, deque()
            for letter in mail:
                letter()
            for job in [*self._running.values(), *self._queue.drain(), *([self._held] if self._held else [])]:
                self._tell_end(job, "error")

    def _open_mail(self) -> bool:
        """Do what others asked for; wait if there is nothing else to do. False when it is time to stop."""
        with self._wake:
            while not (self._mail or self._stopping or self._busy()):
                self._wake.wait()
                self.counts.last = time.monotonic()  # nothing was late: there was nothing to do
            if self._stopping:
                return False
            mail, self._mail = self._mail, deque()
        for letter in mail:
            letter()
        return True

    def _busy(self) -> bool:
        waiting = self._held is not None or len(self._queue) > 0
        return not self._engine.idle or (waiting and not self._blocked)

    def _line_up(self, job: Job) -> None:
        job.queued = self._begun
        self._queue.push(job.tenant, job.cost, job)

    def _fill(self) -> None:
        """Give free rows to those whose turn it is."""
        self._blocked = False
        while self._engine.free_slots > 0:
            job = self._held or self._queue.pop(self._seatable)
            self._held = None
            if job is None:
                # Only a letter changes that: an adapter has been read, or somebody new has come.
                self._blocked = True
                return
            if job.settings.num_samples > self._engine.free_slots:
                self._held = job  # the next rows are its, or smaller ones would be served for ever
                return
            self._begin(job)

    def _seatable(self, job: Job) -> bool:
        if self._store is None or job.entry is None:
            return True
        seatable = self._store.seatable(job.entry, self.poke)
        if not seatable and job.entry.prepared is not None and self._begun - job.queued > PATIENCE:
            self._starving = self._starving or job
        return seatable and self._starving in (None, job)

    def _begin(self, job: Job) -> None:
        self._begun += 1
        if self._starving is job:
            self._starving = None
        try:
            slot = BASE_SLOT
            if self._store is not None and job.entry is not None:
                if job.entry.failed:
                    raise UserError(job.entry.failed)
                slot = self._store.seat(job.entry)
                self._engine.tenants = self._store.bank.tenants
                job.seated = True
            job.request = self._engine.submit(job.prompt, job.settings, slot)
        except UserError as error:
            log.warning("a request could not be begun: %s", error)
            self._tell_end(job, "error")
            return
        except Exception as error:
            log_error("a request could not be begun", error)
            self._tell_end(job, "error")
            return
        self.counts.prompt_tokens += len(job.prompt)
        self._running[job.request] = job

    def _step(self) -> None:
        if self._engine.idle:
            return
        try:
            touched = self._engine.step()
        except Exception as error:
            # Whatever it was, those who were on the device have lost it; the others have not.
            log_error("a step failed", error)
            self.counts.failures += 1
            touched = self._engine.fail()
        self.counts.steps += 1
        for request in touched:
            job = self._running.get(request)
            if job is not None:
                self._tell(job)

    def _tell(self, job: Job) -> None:
        """Hand out what is new of a job."""
        request = job.request
        if request is None:
            return
        for sample, finish in enumerate(request.finish):
            first = job.told[sample]
            tokens = tuple(request.tokens[sample][first:])
            if job.ended[sample] or not (tokens or finish):
                continue
            # The base alone has no router: what its slot of zeros chose says nothing.
            route = request.route if first == 0 and job.entry is not None else None
            logprobs = tuple(request.logprobs[sample][first:])
            job.told[sample] += len(tokens)
            job.ended[sample] = finish is not None
            self.counts.new_tokens += len(tokens)
            self._send(job, News(sample, tokens, logprobs, finish, route))
        if request.done:
            self._running.pop(request, None)
            self._release(job)

    def _tell_end(self, job: Job, reason: str) -> None:
        """End a job that has no more to come."""
        for sample, ended in enumerate(job.ended):
            if not ended:
                job.ended[sample] = True
                self._send(job, News(sample, (), (), reason))
        if job.request is not None:
            self._running.pop(job.request, None)
        self._release(job)

    def _send(self, job: Job, news: News) -> None:
        try:
            job.sink(news)
        except Exception as error:  # whoever listened is gone
            log_error("news could not be delivered", error)

    def _release(self, job: Job) -> None:
        if self._store is not None and job.entry is not None and not job.released:
            if job.seated:
                self._store.leave(job.entry)
            self._store.release(job.entry)
        job.released = True
        self._blocked = False  # somebody may have waited for its slot

    def _end(self, job: Job, sample: int, reason: str) -> None:
        if job.request is not None:
            self._engine.end(job.request, sample, reason)
            self._tell(job)
            return
        job.ended[sample] = True
        if all(job.ended):
            waited = self._queue.remove(job.tenant, job)
            if self._held is job:
                self._held = None
                waited = True
            if self._starving is job:
                self._starving = None
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
