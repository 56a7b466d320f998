"""ASGI middleware in front of the endpoints: error responses, access control, bodies and disconnects.

A request passes :class:`ErrorResponses`, :class:`AccessControl` and :class:`RequestBody`, in this order. They
are ASGI and not FastAPI dependencies because FastAPI reads a body before it calls a dependency: here a client
without a key, or beyond its limits, is refused before a byte of its body is read.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from milora_jax.serving.admission import AdmissionControl
from milora_jax.serving.api_errors import (
    APIError,
    bad_request,
    forbidden,
    internal_error,
    invalid_key,
    log_error,
)
from milora_jax.serving.backend import Backend
from milora_jax.serving.keys import Keyring, Tenant
from milora_jax.serving.limits import Limits
from milora_jax.serving.request_base import parse_body

ANONYMOUS, ADMIN, MONITOR = Tenant("nobody"), Tenant("admin"), Tenant("monitor")
"""Names for requests without a key, and for the keys of administrators and monitors, which are no tenants."""

OPEN_PATH = b"/health/live"
"""The one path that needs no key."""

METRICS_PATH = "/metrics"
MONITOR_PATHS = (METRICS_PATH, "/health/ready", "/health/live")
"""The only paths that a monitor may call."""

ADMIN_PATHS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
GENERATION_PATHS = (
    *("/v1/completions", "/v1/chat/completions", "/v1/responses"),
    *("/tokenize", "/detokenize"),
)
"""Paths of the calls that admission control counts."""


class ClientDisconnected(Exception):
    """The client has closed the connection, or does not read its response."""


def error_response(error: APIError) -> JSONResponse:
    """Return the HTTP response of an error."""
    headers = {"retry-after": str(error.retry_after)} if error.retry_after else {}
    if error.status == 401:
        headers["www-authenticate"] = 'Basic realm="milora_jax", charset="UTF-8"'
    return JSONResponse(error.body, error.status, headers)


class ErrorResponses:
    """Answers errors, counts requests by tenant and status, and disconnects clients that do not read."""

    def __init__(self, app: ASGIApp, service: Backend) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"unsupported scope type {scope['type']}")
        state = scope.setdefault("state", {})
        status = 0

        async def timed_send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            try:
                # Not wait_for: Python 3.11's loses a cancellation that comes as the send completes.
                async with asyncio.timeout(self._service.limits.write_seconds):
                    await send(message)
            except (TimeoutError, OSError):
                raise ClientDisconnected from None

        try:
            await self._app(scope, receive, timed_send)
        except ClientDisconnected:
            status = 499
        except Exception as caught:
            if not isinstance(caught, APIError):
                log_error("a request failed", caught)
            error = caught if isinstance(caught, APIError) else internal_error()
            with contextlib.suppress(ClientDisconnected):
                if not status:
                    await error_response(error)(scope, receive, timed_send)
                elif isinstance(caught, APIError):  # the stream has told the client
                    await timed_send({"type": "http.response.body", "body": b"", "more_body": False})
            status = error.status
        self._service.metrics.requests.labels(state.get("tenant", ANONYMOUS).name, str(status)).inc()


class AccessControl:
    """Checks head, host and key of a request, and whether the key may make the call.

    Args:
      hosts: names under which the server may be called; empty for any.
    """

    def __init__(self, app: ASGIApp, service: Backend, keys: Keyring, hosts: frozenset[str]) -> None:
        self._app, self._service, self._keys, self._hosts = app, service, keys, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Put the tenant of a request into its state."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            _require_short_head(scope, self._service.limits)
            self._require_host(headers)
            if scope["raw_path"] != OPEN_PATH:  # as it came: no other spelling of the path is open
                client, _ = scope.get("client") or ("", 0)
                scope["state"]["tenant"] = self._authorize(scope["path"], key_of(headers), client)
        await self._app(scope, receive, send)

    def _authorize(self, path: str, key: bytes | None, client: str) -> Tenant:
        tenant = self._keys.tenant_of(key)
        admin, monitor = self._keys.is_admin(key), self._keys.is_monitor(key)
        if tenant is None and not admin and not monitor:
            self._service.admission.count_wrong_key(client)
            raise invalid_key()
        hidden = path == METRICS_PATH and not self._keys.may_read_metrics(key)
        only_monitor = tenant is None and not admin
        if hidden or (only_monitor and path not in MONITOR_PATHS) or (path in ADMIN_PATHS and not admin):
            raise forbidden()
        return tenant or (ADMIN if admin else MONITOR)

    def _require_host(self, headers: Headers) -> None:
        hosts = headers.getlist("host")
        if len(hosts) != 1:
            raise bad_request("Expected one Host header.")
        host = hosts[0].lower()
        name = host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.split(":")[0]
        if not all(letter.isalnum() or letter in ".-_:[]" for letter in host):
            raise bad_request("The Host header holds characters that no host name has.")
        if self._hosts and name not in self._hosts:
            raise bad_request("The Host header names another server.")


def _require_short_head(scope: Scope, limits: Limits) -> None:
    headers = scope["headers"]
    size = len(scope["raw_path"]) + sum(len(name) + len(value) + 4 for name, value in headers)
    # uvicorn bounds a head that comes in parts; one that comes in a single packet it accepts at any size.
    if size > limits.header_bytes or len(headers) > limits.headers:
        flags = f"--headers {limits.headers}, --header-bytes {limits.header_bytes}"
        raise APIError(431, f"The head of the request is too long: at most {flags}.")


def key_of(headers: Headers) -> bytes | None:
    """Return the key of a request: a bearer token, or the password of HTTP Basic."""
    values = headers.getlist("authorization")
    if len(values) != 1:
        return None
    scheme, _, value = values[0].partition(" ")
    if scheme.lower() == "bearer":
        return value.encode("latin-1")
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError, binascii.Error):
            return base64.b64decode(value.encode("latin-1"), validate=True).partition(b":")[2]
    return None


class RequestBody:
    """Admits a request, reads its body within the limits, and cancels it when the client disconnects.

    Args:
      paths: paths of the calls that take a body.
    """

    def __init__(self, app: ASGIApp, service: Backend, paths: frozenset[str]) -> None:
        self._app, self._service, self._paths = app, service, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in self._paths:
            await self._app(scope, receive, send)
            return
        with admitted(self._service.admission, scope):
            body = await read_body(scope, receive, self._service.limits)
            parse_body(body)
            # This class watches for the disconnect, as servers do from this version of ASGI on: Starlette
            # need not start a second task for it.
            inner = {**scope, "asgi": {**scope.get("asgi", {}), "spec_version": "2.4"}}
            work = asyncio.ensure_future(self._app(inner, replay(body), send))
            leaving = asyncio.ensure_future(disconnected(receive))
            try:
                await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    raise ClientDisconnected
                work.result()
            finally:
                for task in (work, leaving):
                    task.cancel()
                await asyncio.gather(work, leaving, return_exceptions=True)


def admitted(admission: AdmissionControl, scope: Scope) -> contextlib.AbstractContextManager[None]:
    """Apply admission control to the calls that generate; others are always admitted.

    Raises:
      APIError: the request is not admitted.
    """
    if scope["path"] in GENERATION_PATHS:
        return admission.admit(scope["state"]["tenant"])
    return contextlib.nullcontext()


async def read_body(scope: Scope, receive: Receive, limits: Limits) -> bytes:
    """Return the whole body.

    Raises:
      APIError: it is too long, does not arrive in time, or is not JSON by its headers.
      ClientDisconnected: the client closed the connection.
    """
    headers = Headers(scope=scope)
    if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise APIError(415, "Expected the header Content-Type: application/json.")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise APIError(415, "Expected a body without Content-Encoding.")
    content = bytearray()  # bytes would be copied with every packet
    try:
        async with asyncio.timeout(limits.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnected
                content += message.get("body", b"")
                if len(content) > limits.body_bytes:
                    raise APIError(413, f"The body is longer than --body-bytes {limits.body_bytes}.")
                if not message.get("more_body", False):
                    return bytes(content)
    except TimeoutError:
        raise APIError(408, f"The body took longer than --body-seconds {limits.body_seconds:g}.") from None


async def disconnected(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


def replay(body: bytes) -> Receive:
    """Return a ``receive`` that gives a body that has been read, and then waits."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return messages.pop() if messages else await asyncio.Future()

    return receive
