"""Requests of all kinds: none is answered with 500, none hangs, and the server is there afterwards."""

import asyncio
import json
import threading
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.serving.harness import KEYS, ask, http_scope, openapi
from tests.serving.hostile import requests

# Other threads of a server draw random numbers while hypothesis draws its own.
pytestmark = [
    pytest.mark.thorough,
    pytest.mark.filterwarnings("ignore:Do not use the .random. module:Warning"),
]

ENDS = (b"event: response.completed\n", b"event: response.incomplete\n")
"""What the last event of a streamed response begins with."""

LONGEST = 10
"""Seconds for one request: longer is a hang."""


def profile(count):
    """So many cases, always the same, and no shrinking for an hour."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def call(served, ring):
    """Ask the application itself, without sockets: status, headers and body of an answer."""
    from milora_jax.serving.app import make_app
    from milora_jax.serving.registry import Registry

    app = make_app(served[0], ring, Registry(None, {}))
    events = asyncio.new_event_loop()
    thread = threading.Thread(target=events.run_forever, daemon=True)
    thread.start()

    async def one(path, headers, body):
        came, said = [{"type": "http.request", "body": body}], []

        async def receive():
            if came:
                return came.pop()
            await asyncio.Event().wait()

        async def send(message):
            said.append(message)

        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
        raw += [(b"host", b"localhost"), (b"authorization", f"Bearer {KEYS['one']}".encode())]
        await asyncio.wait_for(app(http_scope(path, raw), receive, send), LONGEST)
        return said[0]["status"], dict(said[0]["headers"]), b"".join(m.get("body", b"") for m in said[1:])

    yield lambda *asked: asyncio.run_coroutine_threadsafe(one(*asked), events).result(2 * LONGEST)
    events.call_soon_threadsafe(events.stop)
    thread.join()
    events.close()


def check(answer):
    """Of any request: an answer of ours, in the shape that it has to have."""
    status, headers, body = answer
    assert status < 500, body
    if status == 200:
        if headers[b"content-type"].startswith(b"text/event-stream"):
            last = body.rstrip(b"\n").rpartition(b"\n\n")[2]
            assert last == b"data: [DONE]" or last.startswith(ENDS)
        else:
            assert json.loads(body).keys() & {"choices", "output", "count", "prompt"}
    else:
        error = json.loads(body)["error"]
        assert sorted(error) == ["code", "message", "param", "type"]
        assert error["message"]
    return status


def fuzz(call, count):
    found = Counter()

    @given(requests())
    @profile(count)
    def run(request):
        found[check(call(*request))] += 1

    run()
    assert sum(found.values()) >= count
    return found


@pytest.mark.sweep("300")
@pytest.mark.parametrize("count", [300, 4000, pytest.param(90000, marks=pytest.mark.slow)])
def test_wrong_values_in_every_field(call, client, served, count):
    found = fuzz(call, count)
    assert found[200] > count // 20, "some of them are right"
    assert found[400] > count // 4
    assert ask(client).status_code == 200
    assert served[0].loop.counts.failures == 0


def from_the_document(served, count):
    """Cases that schemathesis makes of the server's own description: right ones and wrong ones."""
    schemathesis = pytest.importorskip("schemathesis")
    import requests as plain
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error, response_schema_conformance
    from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

    checks = [
        not_a_server_error,
        response_schema_conformance,
        content_type_conformance,
        status_code_conformance,
    ]
    schema = schemathesis.openapi.from_dict(openapi())
    operations = [each.ok() for each in schema.get_all_operations()]
    cases = st.one_of(
        *(each.as_strategy(generation_mode=mode) for each in operations for mode in GenerationMode)
    )
    found = Counter()
    with plain.Session() as session:

        @given(cases)
        @profile(count)
        def run(case):
            headers = {"Authorization": f"Bearer {KEYS['one']}"}
            answer = case.call(base_url=served[1], session=session, headers=headers, timeout=LONGEST)
            case.validate_response(answer, checks=checks)
            documented = case.operation.definition.raw["responses"]
            assert str(answer.status_code) in documented
            found[answer.status_code] += 1

        run()
    return found


@pytest.mark.thorough
def test_what_the_description_says_holds(served, client):
    found = from_the_document(served, 1000)
    assert sum(found.values()) >= 900, "some cases cannot be sent at all"
    assert max(found) < 500
    assert found[200] > 0
    assert ask(client).status_code == 200


@pytest.mark.slow
def test_what_the_description_says_holds_for_long(served, client):
    found = from_the_document(served, 10000)
    assert max(found) < 500
    assert ask(client).status_code == 200
