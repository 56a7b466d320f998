"""Who leaves, who waits, who floods; adapters that come and go; what is not told."""

import contextlib
import json
import logging
import re
import socket
import threading
import time

import pytest

from milora_jax.serving.app import make_app
from milora_jax.serving.registry import Registry
from tests.serving.harness import KEYS, LIMITS, ask, client_of, http_scope, raw, status


def eventually(holds):
    for _ in range(400):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("it never came to hold")


@pytest.mark.parametrize("stream", [False, True])
def test_one_who_leaves_frees_its_row(served, client, stream):
    service, address, _ = served
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps(
        {"model": "math", "prompt": "x", "max_tokens": 90, "stream": stream, "ignore_eos": True}
    )
    request = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEYS['one']}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    )
    ask(client)  # threads that are begun once are there
    threads = threading.active_count()
    for _ in range(10):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(request.encode())
            if stream:
                connection.recv(64)
    eventually(lambda: service.loop.idle and service.admission.active_requests == 0)
    assert all(adapter.users == adapter.running == 0 for adapter in service.store.versions())
    assert threading.active_count() <= threads
    assert ask(client).status_code == 200


def closed_after(connection, seconds):
    """Seconds until the other side has closed a connection."""
    begin = time.monotonic()
    connection.settimeout(seconds)
    while connection.recv(4096):
        pass
    return time.monotonic() - begin


@pytest.mark.thorough
@pytest.mark.parametrize("beginning", [b"", b"GET /health/live HTTP/1.1\r\nHost: "])
def test_a_head_that_does_not_come_is_not_waited_for(served, beginning):
    host, port = served[1].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(beginning)
        assert closed_after(connection, 30) < 10


def test_a_head_that_trickles_is_not_waited_for(served):
    host, port = served[1].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        begin = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - begin < 20:
                connection.sendall(b"x")
                time.sleep(0.1)
        assert time.monotonic() - begin < 10


def test_a_body_that_trickles_is_answered_with_408(served):
    host, port = served[1].removeprefix("http://").split(":")
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEYS['one']}\r\n"
        "Content-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode())
        connection.settimeout(30)
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")


def test_a_head_that_is_too_long_is_refused(served):
    for long in ([f"X: {'x' * 2**15}"], [f"X-{i}: y" for i in range(80)]):
        assert status(raw(served[1], "GET /v1/models HTTP/1.1", "Host: localhost", *long)) == 431


def test_one_who_does_not_read_is_cut(served, ring, monkeypatch):
    """Straight to the application: a socket of this machine takes more than a small model has to say."""
    import asyncio
    import dataclasses

    service, _, _ = served
    app = make_app(service, ring, Registry(None, {}))
    body = json.dumps({"model": "math", "prompt": "x", "max_tokens": 80, "stream": True, "ignore_eos": True})
    headers = [(b"host", b"localhost"), (b"authorization", f"Bearer {KEYS['one']}".encode())]
    headers.append((b"content-type", b"application/json"))
    scope = http_scope("/v1/completions", headers)
    monkeypatch.setattr(service, "limits", dataclasses.replace(service.limits, write_seconds=1.0))

    async def ask_and_not_read():
        sent, asked = [], [{"type": "http.request", "body": body.encode()}]

        async def receive():
            if asked:
                return asked.pop()
            await asyncio.Event().wait()

        async def send(message):
            sent.append(message)
            if len(sent) > 2:
                await asyncio.Event().wait()

        await asyncio.wait_for(app(scope, receive, send), 30)
        return len(sent)

    assert asyncio.run(ask_and_not_read()) == 3
    eventually(lambda: service.loop.idle and service.admission.active_requests == 0)
    assert 'status="499"' in service.metrics.text().decode()


def test_a_tenant_with_too_many_requests_is_told_to_come_again(served):
    results = []

    def one():
        with client_of(served, "two") as client:
            results.append(ask(client, max_tokens=80, ignore_eos=True))

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = sorted(answer.status_code for answer in results)
    assert found[0] == 200
    assert found[-1] == 429
    refused = next(answer for answer in results if answer.status_code == 429)
    assert refused.headers["Retry-After"] == "1"
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"


def test_a_server_that_has_enough_says_so(served):
    service, _, _ = served
    service.admission.active_requests += LIMITS.queue + LIMITS.rows
    try:
        with client_of(served, "one") as client:
            answer = ask(client)
            unread = client.post("/v1/completions", content=b"{", headers={"Content-Type": "text/plain"})
    finally:
        service.admission.active_requests -= LIMITS.queue + LIMITS.rows
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert unread.status_code == 503, "whatever the body is: it is not looked at"


def test_what_is_ready_is_said(served, client):
    assert client.get("/health/ready").json() == {"status": "ready", "free_slots": 4, "under_way": 0}
    with client_of(served, "") as stranger:
        assert stranger.get("/health/live").json() == {"status": "alive"}


def test_adapters_come_and_go_by_their_registered_names(served):
    _, _, folder = served
    registry = folder / "registry.json"
    with client_of(served, "admin") as admin, client_of(served, "two") as two:
        expected = ask(two, model="art").json()["choices"]
        assert admin.post("/v1/unload_lora_adapter", json={"lora_name": "art"}).status_code == 200
        assert not json.loads(registry.read_text())["adapters"]["art"]["loaded"]
        assert ask(two, model="art").status_code == 404
        assert admin.post("/v1/unload_lora_adapter", json={"lora_name": "art"}).status_code == 404
        path = {"lora_name": "art", "lora_path": str(folder / "art")}
        assert admin.post("/v1/load_lora_adapter", json=path).status_code == 400
        assert admin.post("/v1/load_lora_adapter", json={"lora_name": "../art"}).status_code == 404
        assert admin.post("/v1/load_lora_adapter", json={"lora_name": "art"}).status_code == 200
        assert json.loads(registry.read_text())["adapters"]["art"]["loaded"]
        assert ask(two, model="art").json()["choices"] == expected
        kept = folder / "art" / "best" / "7" / "metadata.json"
        whole = kept.read_bytes()
        kept.write_bytes(whole[:-9])
        answer = admin.post("/v1/load_lora_adapter", json={"lora_name": "art"})
        kept.write_bytes(whole)
        assert answer.status_code == 400
        assert str(folder) not in answer.text
        assert ask(two, model="art").json()["choices"] == expected, "what was offered before stays so"


def test_figures_are_there_for_who_watches(served):
    with client_of(served, "monitor") as watching:
        text = watching.get("/metrics").text
    for name in ("requests_total", "tokens_total", "time_to_first_token_seconds", "expert_weight_total"):
        assert f"milora_{name}" in text
    assert 'tenant="one"' in text


def test_errors_of_ours_tell_nothing_and_logs_hold_no_text(served, client, monkeypatch, caplog):
    secret = "canary-of-a-prompt"

    def broken(tokenizer, prompt, prompt_format, **options):
        raise RuntimeError(f"at /secret/path.py 0x7f3a11223344 {prompt}")

    with monkeypatch.context() as patched, caplog.at_level(logging.DEBUG):
        patched.setattr("milora_jax.serving.service.prompt_ids", broken)
        answer = ask(client, prompt=secret)
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "The server could not complete the request."
    for pattern in ("/secret", r"0x[0-9a-f]{6,}", "Traceback", "RuntimeError"):
        assert not re.search(pattern, answer.text)
    assert secret not in caplog.text
    assert KEYS["one"] not in caplog.text
    assert ask(client).status_code == 200
