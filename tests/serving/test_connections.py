"""Time limits of a connection: of the head of a request, and of a client that does not read."""

import asyncio
import contextlib
import socket
import threading
import time

import pytest
import uvicorn

from milora_jax.serving.limits import Limits
from milora_jax.serving.server import uvicorn_config

LIMITS = Limits(header_seconds=1.0, write_seconds=1.0)
GET = b"GET /%s HTTP/1.1\r\nHost: localhost\r\n\r\n"
LONG = 64 * 2**20
"""Bytes of a response, more than the buffers of the operating system take."""


async def app(scope, receive, send):
    """Answers ``/slow`` after more than the limits, and ``/long`` with more than a client takes at once."""
    if scope["path"] == "/slow":
        await asyncio.sleep(2.5)
    body = b"x" * (LONG if scope["path"] == "/long" else 2)
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def address():
    server = uvicorn.Server(uvicorn_config(app, LIMITS))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield listening.getsockname()
        server.should_exit = True
        thread.join(30)


@pytest.fixture
def connection(address):
    with socket.create_connection(address, timeout=20) as connection:
        yield connection


def closed_after(connection):
    """Seconds until the server has closed a connection."""
    begin = time.monotonic()
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(2**20):
            pass
    return time.monotonic() - begin


def answered(connection, path):
    connection.sendall(GET % path)
    assert connection.recv(4096).endswith(b"xx")


def test_half_a_head_after_a_request_closes_the_connection(connection):
    answered(connection, b"")
    connection.sendall(b"GET / HTT")
    assert closed_after(connection) < 10


@pytest.mark.thorough
def test_a_connection_is_kept_between_requests_and_during_a_long_one(connection):
    answered(connection, b"")
    time.sleep(1.5)
    answered(connection, b"slow")


@pytest.mark.thorough
def test_pipelined_requests_are_answered(connection):
    connection.sendall(2 * (GET % b"slow"))
    found = b""
    while found.count(b"HTTP/1.1 200") < 2 or not found.endswith(b"xx"):
        found += connection.recv(4096)


@pytest.mark.thorough
def test_a_client_that_reads_nothing_is_disconnected(connection):
    """The application is done at once: it does not wait for the last part of a response to be read."""
    connection.sendall(GET % b"long")
    time.sleep(4)
    read = 0
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(2**20):
            read += len(part)
    assert read < LONG


@pytest.mark.thorough
def test_a_client_that_reads_slowly_gets_all(connection):
    connection.sendall(GET % b"long")
    read, begin = 0, time.monotonic()
    while read < LONG:
        part = connection.recv(2**18)
        assert part, "the server has closed the connection"
        read += len(part)
        if time.monotonic() - begin < 3:
            time.sleep(0.05)
    assert read >= LONG
