"""``python -m milora_jax.bench serve``: a server under load that does not wait for it.

Requests come at random times (a Poisson process of a given rate), whether or not earlier ones have been
answered, from several tenants for several adapters. One JSON object: what became of them, tokens per second,
and latencies to the first token, between tokens and to the end, over all and by tenant.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from milora_jax.bench import machine
from milora_jax.bench.rounds import names, require_least
from milora_jax.cli import Parser
from milora_jax.errors import UserError

PERCENTILES = (50, 90, 99)

FIRST_ID, LAST_ID = 10, 200
"""Token ids of random prompts: no tokenizer has so few, and the control tokens of most come before."""


@dataclass
class Outcome:
    """What became of one request.

    Attributes:
      status: of HTTP; 0 where the connection broke.
      first, between, whole: seconds to the first piece, between two pieces, and to the end.
      late: seconds after its time at which it was sent: large ones say that this program is the bottleneck.
    """

    tenant: int
    status: int = 0
    tokens: int = 0
    first: float = 0.0
    between: list[float] = field(default_factory=list)
    whole: float = 0.0
    late: float = 0.0
    finished: bool = False


def main(argv: list[str]) -> None:
    """Send, wait, print."""
    asked = _parse(argv)
    keys = [os.environ[name] for name in asked.key] or [""]
    outcomes, seconds = asyncio.run(_load(asked, keys))
    print(json.dumps(report(asked, outcomes, seconds)), flush=True)


def report(asked: argparse.Namespace, outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """The figures of a run.

    Args:
      seconds: from the first request to the last answer.
    """
    served = [outcome for outcome in outcomes if outcome.status == 200 and outcome.finished]
    tenants = sorted({outcome.tenant for outcome in outcomes})
    return {
        "bench": "serve",
        "requests": len(outcomes),
        "rate": asked.rate,
        "statuses": dict(sorted(Counter(str(outcome.status) for outcome in outcomes).items())),
        "unfinished": sum(outcome.status == 200 and not outcome.finished for outcome in outcomes),
        "seconds": seconds,
        "tokens_per_second": sum(outcome.tokens for outcome in served) / seconds,
        "sent_late_ms": percentiles([outcome.late for outcome in outcomes]),
        **figures(served),
        "by_tenant": {
            str(tenant): {
                "served": sum(outcome.tenant == tenant for outcome in served),
                **figures([outcome for outcome in served if outcome.tenant == tenant]),
            }
            for tenant in tenants
        },
        **machine.describe(),
    }


def figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Latencies of some requests, in milliseconds."""
    return {
        "first_token_ms": percentiles([outcome.first for outcome in outcomes]),
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


async def _load(asked: argparse.Namespace, keys: list[str]) -> tuple[list[Outcome], float]:
    import httpx

    rng = np.random.default_rng(asked.seed)
    times = np.cumsum(rng.exponential(1 / asked.rate, asked.requests))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=asked.url, limits=limits, timeout=asked.timeout) as client:
        try:
            (await client.get("/health/live")).raise_for_status()
        except httpx.HTTPError as error:
            raise UserError(f"no server at {asked.url!r} ({type(error).__name__})") from None
        begin = time.perf_counter()
        bodies = [_body(asked, rng) for _ in range(asked.requests)]
        tenants = rng.choice(len(keys), asked.requests, p=_shares(asked, len(keys)))
        outcomes = await asyncio.gather(
            *(
                _one(client, keys[tenant], int(tenant), body, begin + moment)
                for body, tenant, moment in zip(bodies, tenants, times, strict=True)
            )
        )
        return list(outcomes), time.perf_counter() - begin


def _shares(asked: argparse.Namespace, count: int) -> list[float]:
    """Of the tenants: the first may be one who floods."""
    if count == 1:
        return [1.0]
    return [asked.first_share, *[(1 - asked.first_share) / (count - 1)] * (count - 1)]


def _body(asked: argparse.Namespace, rng: np.random.Generator) -> dict[str, Any]:
    prompt = rng.integers(FIRST_ID, LAST_ID, asked.prompt).tolist()
    return {
        "model": asked.models[rng.integers(len(asked.models))],
        "prompt": prompt,
        "max_tokens": asked.new,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def _one(client: Any, key: str, tenant: int, body: dict[str, Any], moment: float) -> Outcome:
    """One request, sent at its time whatever has become of the others."""
    import httpx

    outcome = Outcome(tenant)
    await asyncio.sleep(max(0.0, moment - time.perf_counter()))
    begin = last = time.perf_counter()
    outcome.late = begin - moment
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        async with client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            outcome.status = answer.status_code
            async for line in answer.aiter_lines():
                if answer.status_code != 200 or not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    outcome.finished = True
                    break
                now = time.perf_counter()
                event = json.loads(line.removeprefix("data: "))
                if event.get("usage"):
                    outcome.tokens = event["usage"]["completion_tokens"]
                elif outcome.first == 0.0:
                    outcome.first = now - begin
                else:
                    outcome.between.append(now - last)
                last = now
    except httpx.HTTPError:
        outcome.finished = False
    outcome.whole = time.perf_counter() - begin
    return outcome


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m milora_jax.bench serve", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of a running server")
    parser.add_argument("--models", type=names, required=True, help="names of adapters, asked for alike")
    parser.add_argument(
        "--key", type=names, default=[], help="environment variables with the tenants' keys; default: none"
    )
    parser.add_argument("--first-share", type=float, default=0.5, help="of the first tenant, of two or more")
    parser.add_argument("--rate", type=float, default=4.0, help="requests in a second")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one request")
    asked = parser.parse_args(argv)
    require_least(asked, {"requests": 1, "prompt": 1, "new": 1})
    for name in asked.key:
        if name not in os.environ:
            raise UserError(f"--key {name!r}: there is no such environment variable")
    if not 0 < asked.rate < 1e6 or not 0 <= asked.first_share <= 1:
        raise UserError("--rate is above 0, --first-share from 0 to 1")
    return asked
