"""Requests to a server of OpenAI's API, and the outcome of each.

The client is aiohttp, whose requests cost a fraction of what they cost the server: both share the same few
cores.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from milora_jax.errors import UserError

if TYPE_CHECKING:
    import aiohttp

REFUSED = (429, 503)
"""Statuses of a request that should be sent again later."""

FIRST_ID, LAST_ID = 10, 200
"""Token ids of random prompts: every tokenizer has them, and most control tokens have lower ids."""

LOOK_SECONDS = 0.05
"""Seconds between two checks whether a server has become idle."""


@dataclass(frozen=True)
class Asking:
    """One request.

    Attributes:
      tenant: number of the tenant.
      question: requests of one number have the same body except ``stream``, and must have the same answer.
      leaves: seconds after which the client disconnects; None if it stays.
      marked: whether the server marks the end of a stream; not all do.
    """

    tenant: int
    key: str
    question: int
    body: dict[str, Any]
    leaves: float | None = None
    marked: bool = True


@dataclass
class Outcome:
    """The outcome of one request.

    Attributes:
      status: HTTP status; 0 where the connection broke.
      begun: time at which it was sent, by ``time.perf_counter``.
      first, between, whole: seconds to the first piece, between two pieces, and to the end.
      late: seconds between its planned time and its sending: large ones mean that this program is the
        bottleneck.
      ends: number of ends that were received, which must be 1 for a whole answer and for a stream.
      answer: digest of the text.
    """

    asking: Asking
    status: int = 0
    begun: float = 0.0
    tokens: int = 0
    first: float = 0.0
    between: list[float] = field(default_factory=list)
    whole: float = 0.0
    late: float = 0.0
    ends: int = 0
    left: bool = False
    identity: str = ""
    answer: str = ""

    @property
    def complete(self) -> bool:
        """Whether the answer is complete."""
        return self.status == 200 and self.ends == 1

    @property
    def refused(self) -> bool:
        """Whether the server asked to send it again later."""
        return self.status in REFUSED


def completion(model: str, prompt: list[int], new: int, *, stream: bool) -> dict[str, Any]:
    """The body of a request for ``new`` tokens, which are deterministic."""
    body = {"model": model, "prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True}
    return {**body, "stream": True, "stream_options": {"include_usage": True}} if stream else body


@asynccontextmanager
async def connected(url: str, timeout: float) -> AsyncIterator[aiohttp.ClientSession]:
    """Open a session with a server, with as many connections as there are requests.

    Args:
      timeout: seconds for one request.

    Raises:
      UserError: there is no server.
    """
    import aiohttp

    async with aiohttp.ClientSession(
        url,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=timeout),
    ) as session:
        try:
            async with session.get("/health/live"):
                pass
        except (aiohttp.ClientError, TimeoutError) as error:
            raise UserError(f"no server at {url!r} ({type(error).__name__})") from None
        yield session


async def send(session: aiohttp.ClientSession, asking: Asking) -> Outcome:
    """Send one request and follow it to its end."""
    import aiohttp

    outcome = Outcome(asking, begun=time.perf_counter())
    headers = {"Authorization": f"Bearer {asking.key}"} if asking.key else {}
    try:
        async with (
            asyncio.timeout(asking.leaves),
            session.post("/v1/completions", json=asking.body, headers=headers) as answer,
        ):
            outcome.status = answer.status
            if answer.status == 200 and asking.body.get("stream"):
                await _follow(outcome, answer)
            else:
                whole = await answer.read()
                if answer.status == 200:
                    _take_whole(outcome, json.loads(whole))
    except TimeoutError:
        outcome.left = asking.leaves is not None
        outcome.status = outcome.status if outcome.left else 0
    except (aiohttp.ClientError, OSError, ValueError):
        outcome.status = 0
    outcome.whole = time.perf_counter() - outcome.begun
    return outcome


async def _follow(outcome: Outcome, answer: aiohttp.ClientResponse) -> None:
    """Read a stream of events. It is complete if every sample ended once, and the end mark came once."""
    last, text, finishes, marks = outcome.begun, hashlib.sha256(), 0, 0
    async for line in answer.content:
        if not line.startswith(b"data: "):
            continue
        payload = line[6:].strip()
        if payload == b"[DONE]":
            marks += 1
            continue
        event = json.loads(payload)
        outcome.identity = event.get("id", "")
        if event.get("usage"):
            outcome.tokens = event["usage"]["completion_tokens"]
        for choice in event.get("choices", ()):
            now = time.perf_counter()
            if outcome.first == 0.0:
                outcome.first = now - outcome.begun
            else:
                outcome.between.append(now - last)
            last = now
            text.update(choice.get("text", "").encode())
            finishes += choice.get("finish_reason") is not None
    outcome.ends = finishes if marks == outcome.asking.marked else 0
    outcome.answer = text.hexdigest()


def _take_whole(outcome: Outcome, value: dict[str, Any]) -> None:
    outcome.identity, outcome.tokens = value["id"], value["usage"]["completion_tokens"]
    outcome.ends = sum(choice["finish_reason"] is not None for choice in value["choices"])
    text = "".join(choice["text"] for choice in value["choices"])
    outcome.answer = hashlib.sha256(text.encode()).hexdigest()


async def open_loop(
    session: aiohttp.ClientSession, askings: Sequence[Asking], moments: Iterable[float]
) -> list[Outcome]:
    """Send requests at their times, whatever the state of earlier ones.

    Args:
      moments: seconds from now, ascending.
    """
    start = time.perf_counter()

    async def at(asking: Asking, moment: float) -> Outcome:
        outcome = await send(session, asking)
        outcome.late = outcome.begun - start - moment
        return outcome

    tasks = []
    for asking, moment in zip(askings, moments, strict=True):
        await asyncio.sleep(max(0.0, start + moment - time.perf_counter()))
        tasks.append(asyncio.ensure_future(at(asking, moment)))
    return await asyncio.gather(*tasks)


async def closed_loop(
    session: aiohttp.ClientSession, askings: Sequence[Asking], clients: int
) -> list[Outcome]:
    """Send requests from a number of clients, each of which waits for its last answer first."""
    waiting = iter(askings)

    async def client() -> list[Outcome]:
        return [await send(session, asking) for asking in waiting]

    found = await asyncio.gather(*(client() for _ in range(clients)))
    return [outcome for each in found for outcome in each]


def poisson(rng: np.random.Generator, rate: float, count: int) -> list[float]:
    """Times of a Poisson process, in seconds."""
    return np.cumsum(rng.exponential(1 / rate, count)).tolist()


@dataclass(frozen=True)
class Watch:
    """Reads a server's metrics and whether it has work.

    Args:
      key: a key that may read them.
    """

    session: aiohttp.ClientSession
    key: str

    async def figures(self) -> dict[str, float]:
        """Values without labels by name; empty if the server does not show its metrics."""
        _, text = await self._get("/metrics", lambda answer: answer.text())
        found = {}
        for line in (text or "").splitlines():
            name, _, value = line.partition(" ")
            if not name.startswith("#") and "{" not in name:
                found[name] = float(value)
        return found

    async def seconds_to_idle(self, limit: float) -> float | None:
        """Seconds until the server is idle; None if that takes longer than ``limit``.

        A server that is too busy to answer is not idle; one without such a path is not waited for.
        """
        start = time.perf_counter()
        while time.perf_counter() - start < limit:
            status, state = await self._get("/health/ready", lambda answer: answer.json())
            if status == 404:
                return None
            if state is not None and state["under_way"] == 0:
                return time.perf_counter() - start
            await asyncio.sleep(LOOK_SECONDS)
        return None

    async def _get(
        self, path: str, read: Callable[[aiohttp.ClientResponse], Awaitable[Any]]
    ) -> tuple[int, Any]:
        """The status, and the parsed body of a good answer."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        async with self.session.get(path, headers=headers) as answer:
            return answer.status, await read(answer) if answer.status == 200 else None
