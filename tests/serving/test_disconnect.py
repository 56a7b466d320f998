"""A client who leaves at any moment of a stream: what was begun for it ends then."""

import asyncio
import json
from contextlib import asynccontextmanager
from unittest.mock import Mock

import pytest

from milora_jax.serving.admission import AdmissionControl
from milora_jax.serving.app import make_app
from milora_jax.serving.backend import Backend, Delta, Generation
from milora_jax.serving.keys import Keyring
from milora_jax.serving.limits import Limits
from milora_jax.serving.metrics import Metrics
from milora_jax.serving.registry import Registry
from tests.serving.harness import http_scope

LIMITS = Limits(rows=4, context=96)
ENDLESS = 400
"""Pieces of an answer that nobody waits for."""


async def answer(waits, between):
    """Ask for a stream, leave after so many turns of the event loop, and count the pieces that were made."""
    made, came = 0, [json.dumps({"model": "m", "prompt": "x", "stream": True}).encode()]

    async def pieces():
        nonlocal made
        while made < ENDLESS:
            made += 1
            for _ in range(between):
                await asyncio.sleep(0)
            yield Delta(0, "a", (1,), (), None, None)

    @asynccontextmanager
    async def generate(tenant, body):
        yield Generation("cmpl-0", "m", ((1,),), pieces())

    async def receive():
        if came:
            return {"type": "http.request", "body": came.pop()}
        for _ in range(waits):
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def send(message):
        await asyncio.sleep(0)

    service = Mock(
        spec=Backend,
        limits=LIMITS,
        admission=AdmissionControl(LIMITS),
        metrics=Metrics(),
        generate=generate,
        token_text=lambda token: "a",
    )
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    app = make_app(service, Keyring(open=True), Registry(None, {}))
    await app(http_scope("/v1/completions", headers), receive, send)
    return made


@pytest.mark.thorough
@pytest.mark.parametrize("between", [0, 1, 3])
def test_what_was_begun_ends_at_whatever_moment_the_client_leaves(between):
    """The moments are turns of the event loop, so that each of them is met; a piece takes at least one."""
    made = [asyncio.run(answer(waits, between)) for waits in range(60)]
    assert all(count <= waits + 5 for waits, count in enumerate(made)), made
