"""``python -m milora_jax.bench serve``: a running server under load, and what became of every request.

``--rate`` sends requests at random times (a Poisson process), whether or not earlier ones have been answered;
``--clients`` lets so many clients wait for one answer before they ask for the next. ``--overload X`` first
finds out how many requests the server can answer, with ``--clients``, and then sends X times as many for
``--seconds``. ``--leave`` lets a share of the clients go away in the middle.

One JSON object: what became of the requests, tokens per second, latencies to the first token, between pieces
and to the end, over all and by tenant; and what the server says of its own memory, files, tasks and programs
before and after.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from milora_jax.bench import machine
from milora_jax.bench.rounds import names, require_least
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
from milora_jax.cli import Parser
from milora_jax.errors import UserError

PERCENTILES = (50, 90, 99)

WATCHED = {
    "memory_mb": ("process_resident_memory_bytes", 1e6),
    "files": ("process_open_fds", 1),
    "tasks": ("milora_tasks", 1),
    "compiled": ("milora_compiled_programs_total", 1),
    "steps": ("milora_steps", 1),
}
"""What is told of the server: the metric and its unit."""

IDLE_SECONDS = 60.0
"""A server that has work for longer, after everything was answered, is not becoming idle."""


def main(argv: list[str]) -> None:
    """Send, wait, print."""
    asked = _parse(argv)
    keys = [os.environ[name] for name in asked.key] or [""]
    print(json.dumps(asyncio.run(_measure(asked, keys))), flush=True)


async def _measure(asked: argparse.Namespace, keys: list[str]) -> dict[str, Any]:
    rng = np.random.default_rng(asked.seed)
    found: dict[str, Any] = {"bench": "serve"}
    async with connected(asked.url, asked.timeout) as watching:
        watch = Watch(watching, os.environ[asked.watch_key] if asked.watch_key else keys[0])
        rate = asked.rate
        if asked.overload:
            found["capacity"] = await _capacity(asked, keys, rng)
            rate = asked.overload * found["capacity"]["complete_per_second"]
        count = int(rate * asked.seconds) if asked.overload else asked.requests
        asking = askings(asked, keys, rng, count)
        before = await watch.figures()
        async with connected(asked.url, asked.timeout) as session:
            if asked.clients and not asked.overload:
                seconds, outcomes = await _timed(closed_loop(session, asking, asked.clients))
            else:
                found["rate"] = rate
                seconds, outcomes = await _timed(open_loop(session, asking, poisson(rng, rate, count)))
            found["idle_after_s"] = await watch.seconds_to_idle(IDLE_SECONDS)
        await asyncio.sleep(1.0)  # our connections are closed now: the server sees it a moment later
        after = await watch.figures()
    server = {
        name: {"before": before[metric] / unit, "after": after[metric] / unit}
        for name, (metric, unit) in WATCHED.items()
        if metric in before and metric in after
    }
    return {**found, **report(outcomes, seconds), "server": server, **machine.describe()}


async def _capacity(asked: argparse.Namespace, keys: list[str], rng: np.random.Generator) -> dict[str, Any]:
    """What the server does for clients who wait."""
    async with connected(asked.url, asked.timeout) as session:
        asking = askings(asked, keys, rng, asked.requests)
        seconds, outcomes = await _timed(closed_loop(session, asking, asked.clients))
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
    """Of some requests that were answered, in milliseconds."""
    return {
        "first_token_ms": percentiles([outcome.first for outcome in outcomes if outcome.first]),
        "between_pieces_ms": percentiles([gap for outcome in outcomes for gap in outcome.between]),
        "whole_ms": percentiles([outcome.whole for outcome in outcomes]),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """In milliseconds, by name; empty of nothing.

    >>> percentiles([0.001, 0.002, 0.003])
    {'p50': 2.0, 'p90': 2.8, 'p99': 2.98}
    """
    if not seconds:
        return {}
    values = np.percentile(np.asarray(seconds) * 1e3, PERCENTILES)
    return {f"p{name}": round(float(value), 3) for name, value in zip(PERCENTILES, values, strict=True)}


def askings(asked: argparse.Namespace, keys: list[str], rng: np.random.Generator, count: int) -> list[Asking]:
    """Random requests: of ``--questions`` different ones, streamed but for a share of ``--whole``."""
    questions = [
        (
            asked.models[rng.integers(len(asked.models))],
            rng.integers(FIRST_ID, LAST_ID, asked.prompt).tolist(),
        )
        for _ in range(asked.questions)
    ]
    tenants = rng.choice(len(keys), count, p=_shares(asked, len(keys)))
    found = []
    for tenant in tenants.tolist():
        number = int(rng.integers(len(questions)))
        body = completion(*questions[number], asked.new, stream=rng.random() >= asked.whole)
        leaves = rng.uniform(0.0, asked.leave_within) if rng.random() < asked.leave else None
        found.append(Asking(tenant, keys[tenant], number, body, leaves))
    return found


def _shares(asked: argparse.Namespace, count: int) -> list[float]:
    """Of the tenants: the first may be one who floods."""
    if count == 1:
        return [1.0]
    return [asked.first_share, *[(1 - asked.first_share) / (count - 1)] * (count - 1)]


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m milora_jax.bench serve", description=__doc__)
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="of a running server")
    add("--models", type=names, required=True, help="names of adapters, asked for alike")
    add("--key", type=names, default=[], help="environment variables with the tenants' keys; default: none")
    add("--watch-key", default="", help="variable with a monitor's key (default: the first tenant's)")
    add("--first-share", type=float, default=0.5, help="of the first tenant, of two or more")
    add("--rate", type=float, default=4.0, help="requests in a second, sent at random times")
    add("--clients", type=int, default=0, help="who wait for one answer before they ask again, instead")
    add("--overload", type=float, default=0.0, help="times what --clients can get answered, for --seconds")
    add("--seconds", type=float, default=60.0, help="of the overload")
    add("--requests", type=int, default=100, help="sent in all")
    add("--questions", type=int, default=50, help="different requests: each has one answer, however often")
    add("--whole", type=float, default=0.0, help="share of requests whose answer is not streamed")
    add("--leave", type=float, default=0.0, help="share of clients who go away before the end")
    add("--leave-within", type=float, default=1.0, help="seconds, at random, after which they do")
    add("--prompt", type=int, default=64, help="tokens of a prompt")
    add("--new", type=int, default=32, help="tokens of an answer")
    add("--seed", type=int, default=0, help="of times, questions and choices")
    add("--timeout", type=float, default=600.0, help="seconds for one request")
    asked = parser.parse_args(argv)
    require_least(asked, {"requests": 1, "prompt": 1, "new": 1, "clients": 0, "questions": 1})
    for option, variables in (("--key", asked.key), ("--watch-key", [asked.watch_key])):
        for name in variables:
            if name and name not in os.environ:
                raise UserError(f"{option} {name!r}: there is no such environment variable")
    if not 0 < asked.rate < 1e6 or not 0 <= asked.overload < 1e3 or asked.seconds <= 0:
        raise UserError("--rate and --seconds are above 0, --overload from 0 to 1000")
    for name in ("first_share", "whole", "leave"):
        if not 0 <= getattr(asked, name) <= 1:
            raise UserError(f"--{name.replace('_', '-')} is a share, from 0 to 1")
    if asked.overload and not asked.clients:
        raise UserError("--overload needs --clients, who find out what the server can do")
    return asked
