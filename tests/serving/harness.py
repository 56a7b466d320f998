"""A small model with three adapters, and a server of it in a thread."""

import dataclasses
import hashlib
import json
import queue
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import httpx
import openai

from milora_jax.generation.settings import GenerationSettings
from milora_jax.serving.app import make_app
from milora_jax.serving.backend import Backend
from milora_jax.serving.build import Offer, build_service
from milora_jax.serving.jobs import Job
from milora_jax.serving.keys import Keyring
from milora_jax.serving.limits import Limits
from milora_jax.serving.registry import Registered, Registry
from milora_jax.serving.server import bound_socket, make_server
from tests.generation.constraints import Steps
from tests.models import WITH_TOKENIZER, write_hf_directory
from tests.storage.adapters import run_of

LIMITS = Limits(
    rows=4,
    context=96,
    chunk=4,
    adapters_on_device=2,
    queue=300,
    samples=2,
    header_seconds=2.0,
    body_seconds=2.0,
)
ADAPTERS = ("math", "law", "art")

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def write_model(folder: Path, template: str = TEMPLATE) -> dict[str, Path]:
    """A model with a chat template, and workdirs of adapters on it by name."""
    model = folder / "model"
    # No token ends a text by itself: the length of an answer is the asked one.
    write_hf_directory(model, dataclasses.replace(WITH_TOKENIZER, eos_ids=(2,)))
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    adapters = {}
    for name in ADAPTERS:
        adapters[name] = folder / name
        run_of(adapters[name], model, "milora", seed=len(adapters))
    return adapters


def service_of(folder: Path, adapters: dict[str, Path], limits: Limits = LIMITS, path: Path | None = None):
    """A service, whose loop has not begun, and its registry."""
    registry = Registry(path, {name: Registered(directory) for name, directory in adapters.items()})
    return build_service(Offer(str(folder / "model"), "base"), registry, limits), registry


@contextmanager
def running(service):
    """The loop of a service at work."""
    service.loop.start()
    try:
        yield service
    finally:
        service.loop.stop()


@contextmanager
def serving(service, registry, keys: Keyring):
    """The address of a server of a service whose loop is at work."""
    bound = bound_socket(keys, "127.0.0.1", 0)
    server = make_server(service, keys, registry, bound)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


WAIT = 60
"""Seconds for a stream event of a job: longer is a hang."""


class Listener:
    """A job and its stream events, with the counters of the loop at the time of each."""

    def __init__(self, service, name, prompt, *, constraint=None, cache_scope=None, **settings):
        self.service, self.events, self.counted = service, queue.Queue(), []
        adapter = None if name == "base" else service.store.acquire(name)
        settings = GenerationSettings(**{"max_new_tokens": 6, "ignore_eos": True, **settings})
        self.job = Job(
            "tenant",
            adapter,
            tuple(prompt),
            settings,
            self._on_event,
            cache_scope=None if cache_scope is None else f"{name} {cache_scope}",
            constraint=constraint,
        )
        service.loop.submit(self.job)
        if adapter is not None:
            service.store.release(adapter)

    def _on_event(self, event):
        self.counted.append(dataclasses.replace(self.service.loop.counts))
        self.events.put(event)

    def end(self):
        """Tokens, log-probabilities and endings of all samples."""
        count = self.job.settings.num_samples
        tokens, logprobs, finish = [[] for _ in range(count)], [[] for _ in range(count)], [None] * count
        self.route, self.prompt_logprobs = None, []
        while None in finish:
            event = self.events.get(timeout=WAIT)
            tokens[event.sample] += event.tokens
            logprobs[event.sample] += event.logprobs
            finish[event.sample] = event.finish
            self.route = event.route if event.route is not None else self.route
            if event.prompt_logprobs:
                self.prompt_logprobs.append(event.prompt_logprobs)
        assert self.events.empty()
        return tokens, logprobs, finish


BEGINNING = [4 + 37 * i % 300 for i in range(70)]
"""Of prompts that the prefix cache may know."""


def random_request(rng):
    """Adapter, prompt, settings, and what else a request may ask for: a constraint, the prefix cache."""
    settings = {"max_new_tokens": int(rng.integers(1, 20)), "seed": int(rng.integers(1000))}
    if rng.random() < 0.5:
        settings |= {"temperature": 1.3, "top_p": 0.9}
    if rng.random() < 0.3:
        settings |= {"presence_penalty": 0.5}
    if rng.random() < 0.3:
        settings |= {"frequency_penalty": 0.4, "logit_bias": ((int(rng.integers(8, 320)), 4.0), (7, -100.0))}
    if rng.random() < 0.5:
        settings |= {"logprobs": 3}
    if rng.random() < 0.3:
        settings |= {"prompt_logprobs": 2}
        settings |= {"max_new_tokens": 0} if rng.random() < 0.3 else {}
    if rng.random() < 0.2:
        settings |= {"num_samples": 2}
    name = ("base", "math", "law", "art")[rng.integers(4)]
    prompt = rng.integers(4, 320, int(rng.integers(1, 60))).tolist()
    if rng.random() < 0.3:
        prompt = [*BEGINNING, *prompt[: int(rng.integers(6))]]
        settings |= {"cache_scope": "shared"}
    if rng.random() < 0.1:
        vocab_size = WITH_TOKENIZER.vocab_size
        sets = [set(rng.integers(4, vocab_size, 9).tolist()) for _ in range(int(rng.integers(1, 6)))]
        settings |= {"constraint": Steps([*sets, {2}], vocab_size=vocab_size)}
    if rng.random() < 0.2:
        prompt = prompt[:4] * (len(prompt) // 4 or 1)  # a text that repeats itself proposes its next tokens
    return name, prompt, settings


KEYS = {
    "one": "sk-one-" + "a" * 20,
    "two": "sk-two-" + "b" * 20,
    "admin": "sk-admin-" + "c" * 20,
    "many": "sk-many-" + "d" * 20,
    "monitor": "sk-monitor-" + "e" * 20,
}


def digest(name):
    """Of somebody's key."""
    return hashlib.sha256(KEYS[name].encode()).hexdigest()


def client_of(served, name):
    """A client with somebody's key, or with none."""
    headers = {"Authorization": f"Bearer {KEYS[name]}"} if name else {}
    return httpx.Client(base_url=served[1], headers=headers, timeout=60)


def openai_client(address, name):
    """OpenAI's client with somebody's key."""
    return openai.OpenAI(base_url=f"{address}/v1", api_key=KEYS[name], max_retries=0)


def openapi():
    """The OpenAPI document."""
    return make_app(Mock(spec=Backend), Keyring(), Registry(None, {})).openapi()


def http_scope(path, headers, method="POST"):
    """An ASGI scope, for a call without a socket."""
    return {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": headers,
    }


def ask(client, **more):
    """A completion; a field that is ``...`` is left out."""
    body = {"model": "math", "prompt": "What is 3 * 7?", "max_tokens": 8, "temperature": 0, **more}
    return client.post("/v1/completions", json={k: v for k, v in body.items() if v is not ...})


def raw(address, *lines, body=b""):
    """The answer to a request that no library would send."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        connection.settimeout(30)
        return connection.recv(65536).decode("latin-1")


def status(answer):
    """Of a raw answer; 0 where there was none."""
    return int(answer.split(" ", 2)[1]) if answer else 0
