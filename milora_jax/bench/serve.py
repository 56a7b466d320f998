"""``python -m milora_jax.bench serve``: load a running server, and report the outcome of every request.

``--rate`` sends requests at random times (a Poisson process), whether or not earlier ones have been answered;
``--clients`` is a number of clients that each wait for an answer before they send the next request.
``--overload X`` first measures how many requests the server can answer, with ``--clients``, and then sends X
times as many for ``--seconds``. ``--leave`` is the share of clients that disconnect before the end.

One JSON object: outcomes of the requests, tokens per second, latencies to the first token, between pieces and
to the end, over all and by tenant; and the server's memory, files, tasks and programs before and after.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from milora_jax.bench import machine
from milora_jax.bench.rounds import BenchSettings, option
from milora_jax.bench.traffic import (
    FIRST_ID,
    LAST_ID,
    Asking,
    Outcome,
    Watch,
    closed_loop,
    completion,
    connected,
    open_loop,
    poisson,
)
from milora_jax.errors import UserError

PERCENTILES = (50, 90, 99)

WATCHED = {
    "memory_mb": ("process_resident_memory_bytes", 1e6),
    "files": ("process_open_fds", 1),
    "tasks": ("milora_tasks", 1),
    "compiled": ("milora_compiled_programs_total", 1),
    "steps": ("milora_steps", 1),
}
"""The server's metrics that are reported, and their units."""

IDLE_SECONDS = 60.0
"""A server that still has work after this time, when everything was answered, is not becoming idle."""


@dataclass(frozen=True)
class Settings(BenchSettings):
    """The settings of ``bench serve``.

    Attributes:
      models: names of adapters, requested equally often.
      url: URL of a running server.
      key: environment variables with the tenants' keys; default: none.
      watch_key: variable with a monitor's key (default: the first tenant's).
      first_share: share of the requests of the first tenant, if there are several.
      rate: requests in a second, sent at random times.
      clients: number of clients that wait for an answer before they send again, instead.
      overload: multiple of the rate that --clients get answered, for --seconds.
      seconds: length of the overload.
      requests: number of requests in all.
      questions: number of different requests; each has one answer, however often it is sent.
      whole: share of requests whose answer is not streamed.
      leave: share of clients that disconnect before the end.
      leave_within: seconds within which they do, at random.
      prompt: tokens of a prompt.
      new: tokens of an answer.
      seed: seed of times, questions and choices.
      timeout: seconds for one request.
    """

    models: tuple[str, ...]
    url: str = "http://127.0.0.1:8000"
    key: tuple[str, ...] = ()
    watch_key: str = ""
    first_share: float = 0.5
    rate: float = 4.0
    clients: int = option(0, least=0)
    overload: float = 0.0
    seconds: float = 60.0
    requests: int = option(100, least=1)
    questions: int = option(50, least=1)
    whole: float = 0.0
    leave: float = 0.0
    leave_within: float = 1.0
    prompt: int = option(64, least=1)
    new: int = option(32, least=1)
    seed: int = 0
    timeout: float = 600.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for option_name, variables in (("--key", self.key), ("--watch-key", (self.watch_key,))):
            for name in variables:
                if name and name not in os.environ:
                    raise UserError(f"{option_name} {name!r}: there is no such environment variable")
        if not 0 < self.rate < 1e6 or not 0 <= self.overload < 1e3 or self.seconds <= 0:
            raise UserError("--rate and --seconds are above 0, --overload from 0 to 1000")
        for name in ("first_share", "whole", "leave"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')} is a share, from 0 to 1")
        if self.overload and not self.clients:
            raise UserError("--overload needs --clients, who find out what the server can do")


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Send the requests, wait for the answers, and yield the only report."""
    keys = [os.environ[name] for name in settings.key] or [""]
    yield asyncio.run(_measure(settings, keys))


async def _measure(settings: Settings, keys: list[str]) -> dict[str, Any]:
    rng = np.random.default_rng(settings.seed)
    found: dict[str, Any] = {"bench": "serve"}
    async with connected(settings.url, settings.timeout) as watching:
        watch = Watch(watching, os.environ[settings.watch_key] if settings.watch_key else keys[0])
        rate = settings.rate
        if settings.overload:
            found["capacity"] = await _capacity(settings, keys, rng)
            rate = settings.overload * found["capacity"]["complete_per_second"]
        count = int(rate * settings.seconds) if settings.overload else settings.requests
        asking = askings(settings, keys, rng, count)
        before = await watch.figures()
        async with connected(settings.url, settings.timeout) as session:
            if settings.clients and not settings.overload:
                seconds, outcomes = await _timed(closed_loop(session, asking, settings.clients))
            else:
                found["rate"] = rate
                seconds, outcomes = await _timed(open_loop(session, asking, poisson(rng, rate, count)))
            found["idle_after_s"] = await watch.seconds_to_idle(IDLE_SECONDS)
        await asyncio.sleep(1.0)  # the server sees a moment later that our connections are closed
        after = await watch.figures()
    server = {
        name: {"before": before[metric] / unit, "after": after[metric] / unit}
        for name, (metric, unit) in WATCHED.items()
        if metric in before and metric in after
    }
    return {**found, **report(outcomes, seconds), "server": server, **machine.describe()}


async def _capacity(settings: Settings, keys: list[str], rng: np.random.Generator) -> dict[str, Any]:
    """Measure what the server can do for clients that wait."""
    async with connected(settings.url, settings.timeout) as session:
        asking = askings(settings, keys, rng, settings.requests)
        seconds, outcomes = await _timed(closed_loop(session, asking, settings.clients))
    found = report(outcomes, seconds)
    kept = ("complete", "statuses", "seconds", "tokens_per_second", "first_token_ms", "whole_ms")
    return {"complete_per_second": found["complete"] / seconds, **{name: found[name] for name in kept}}


async def _timed(work: Any) -> tuple[float, list[Outcome]]:
    loop = asyncio.get_running_loop()
    begin = loop.time()
    outcomes = await work
    return loop.time() - begin, outcomes


def report(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """The figures of a run.

    Args:
      seconds: from the first request to the last answer.
    """
    complete = [outcome for outcome in outcomes if outcome.complete]
    stayed = [outcome for outcome in outcomes if not outcome.left]
    identities = Counter(outcome.identity for outcome in outcomes if outcome.identity)
    answers = defaultdict(set)
    for outcome in complete:
        answers[outcome.asking.question].add(outcome.answer)
    tenants = sorted({outcome.asking.tenant for outcome in outcomes})
    return {
        "requests": len(outcomes),
        "statuses": dict(sorted(Counter(str(outcome.status) for outcome in stayed).items())),
        "complete": len(complete),
        "left": len(outcomes) - len(stayed),
        "broken": sum(outcome.status == 200 and not outcome.complete for outcome in stayed),
        "doubled": sum(count - 1 for count in identities.values())
        + sum(outcome.ends > 1 for outcome in outcomes),
        "questions": len(answers),
        "questions_with_several_answers": sum(len(found) > 1 for found in answers.values()),
        "seconds": seconds,
        "tokens_per_second": sum(outcome.tokens for outcome in complete) / seconds,
        "sent_late_ms": percentiles([outcome.late for outcome in outcomes]),
        "refused_ms": percentiles([outcome.whole for outcome in outcomes if outcome.refused]),
        **latencies(complete),
        "by_tenant": {
            str(tenant): {
                "complete": sum(outcome.asking.tenant == tenant for outcome in complete),
                "refused": sum(outcome.asking.tenant == tenant and outcome.refused for outcome in outcomes),
                **latencies([outcome for outcome in complete if outcome.asking.tenant == tenant]),
            }
            for tenant in tenants
        },
    }


def latencies(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Latencies of the answered requests, in milliseconds."""
    return {
        "first_token_ms": percentiles([outcome.first for outcome in outcomes if outcome.first]),
        "between_pieces_ms": percentiles([gap for outcome in outcomes for gap in outcome.between]),
        "whole_ms": percentiles([outcome.whole for outcome in outcomes]),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Percentiles in milliseconds by name; empty for no values.

    >>> percentiles([0.001, 0.002, 0.003])
    {'p50': 2.0, 'p90': 2.8, 'p99': 2.98}
    """
    if not seconds:
        return {}
    values = np.percentile(np.asarray(seconds) * 1e3, PERCENTILES)
    return {f"p{name}": round(float(value), 3) for name, value in zip(PERCENTILES, values, strict=True)}


def askings(settings: Settings, keys: list[str], rng: np.random.Generator, count: int) -> list[Asking]:
    """Make random requests of ``--questions`` kinds, streamed except for a share of ``--whole``."""
    questions = [
        (
            settings.models[rng.integers(len(settings.models))],
            rng.integers(FIRST_ID, LAST_ID, settings.prompt).tolist(),
        )
        for _ in range(settings.questions)
    ]
    tenants = rng.choice(len(keys), count, p=_shares(settings, len(keys)))
    found = []
    for tenant in tenants.tolist():
        number = int(rng.integers(len(questions)))
        body = completion(*questions[number], settings.new, stream=rng.random() >= settings.whole)
        leaves = rng.uniform(0.0, settings.leave_within) if rng.random() < settings.leave else None
        found.append(Asking(tenant, keys[tenant], number, body, leaves))
    return found


def _shares(settings: Settings, count: int) -> list[float]:
    """The tenants' shares of the requests; the first may flood the server."""
    if count == 1:
        return [1.0]
    return [settings.first_share, *[(1 - settings.first_share) / (count - 1)] * (count - 1)]
