"""The front end of replicas without Ray: every message is pickled, as it is between two processes."""

import asyncio
import pickle
from types import SimpleNamespace

import httpx
import pytest

from milora_jax.serving.app import make_app
from milora_jax.serving.build import Offer
from milora_jax.serving.ray_serve import Engine, Replicas
from milora_jax.serving.registry import Registered, Registry
from tests.serving.harness import KEYS, LIMITS


def sent(value):
    return pickle.loads(pickle.dumps(value))


class Stream:
    """What Ray's handle returns for a generator."""

    def __init__(self, generator):
        self.generator, self.cancelled = generator, False

    async def __anext__(self):
        return sent(await anext(self.generator))

    def cancel(self):
        self.cancelled = True


class Handle:
    """A handle of two engines, of which the first one serves all requests."""

    def __init__(self, service):
        async def mark_used(name):
            return name

        self.engine = SimpleNamespace(_service=service, _mark_used=mark_used)
        self.streams = []

    def options(self, **options):
        assert options["stream"]
        self.method = getattr(Engine, options["method_name"])
        return self

    def remote(self, *arguments):
        self.streams.append(Stream(self.method(self.engine, *map(sent, arguments))))
        return self.streams[-1]

    def broadcast(self, name, *arguments):
        async def results():
            return [sent(await getattr(Engine, name)(self.engine, *map(sent, arguments))) for _ in range(2)]

        return SimpleNamespace(results_async=results)


@pytest.fixture
def front(served, ring):
    service, _, folder = served
    handle = Handle(service)
    replicas = Replicas(handle, Offer(str(folder / "model"), "base"), {"math", "law"}, LIMITS)
    registry = Registry(None, {"art": Registered(folder / "art", loaded=False)})
    return make_app(replicas, ring, registry), handle


def call(app, *requests):
    """The responses to some requests, each a method, a path, the name of a key and a body."""

    async def run():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            return [
                await client.request(
                    method, path, json=body, headers={"Authorization": f"Bearer {KEYS[key]}"}
                )
                for method, path, key, body in requests
            ]

    return asyncio.run(run())


ASKED = {"model": "math", "prompt": "What is 3 * 7?", "max_tokens": 8, "temperature": 0, "logprobs": 1}


def test_the_front_end_answers_as_one_server_does(front, client):
    app, handle = front
    expected = client.post("/v1/completions", json=ASKED).json()["choices"]
    path = "/v1/completions"
    whole, stream, wrong, foreign = call(
        app,
        ("POST", path, "one", ASKED),
        ("POST", path, "one", {**ASKED, "stream": True}),
        ("POST", path, "one", {**ASKED, "max_tokens": 10**6}),
        ("POST", path, "one", {**ASKED, "model": "law"}),
    )
    assert whole.json()["choices"] == expected
    assert stream.text.endswith("data: [DONE]\n\n")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert foreign.status_code == 404
    assert len(handle.streams) == 3, "an engine is not asked for a model that the tenant may not use"
    assert all(stream.cancelled for stream in handle.streams)


def test_health_metrics_and_adapters_are_those_of_all_engines(front):
    app, _ = front
    name = {"lora_name": "art"}
    ready, metrics, before, loaded, models, unloaded = call(
        app,
        ("GET", "/health/ready", "one", None),
        ("GET", "/metrics", "monitor", None),
        ("POST", "/v1/load_lora_adapter", "admin", {"lora_name": "nothing"}),
        ("POST", "/v1/load_lora_adapter", "admin", name),
        ("GET", "/v1/models", "two", None),
        ("POST", "/v1/unload_lora_adapter", "one", name),
    )
    assert ready.json() == {"status": "ready", "free_slots": 2 * LIMITS.rows, "under_way": 0}
    assert 'process="front"' in metrics.text
    assert 'process="1"' in metrics.text
    assert before.status_code == 404
    assert loaded.json() == {"status": "loaded", "lora_name": "art"}
    assert [model["id"] for model in models.json()["data"]] == ["base", "art", "law", "math"]
    assert unloaded.status_code == 403
