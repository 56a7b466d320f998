"""One exchange of HTTP as ASGI has it: heads, bodies within their limits, answers, events."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from milora_jax.serving.answers import as_json
from milora_jax.serving.limits import Limits
from milora_jax.serving.refusal import Refusal

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Gone(Exception):
    """The client has left, or does not read what it asked for."""


async def read_body(scope: Scope, receive: Receive, limits: Limits) -> bytes:
    """A body within its limits.

    Raises:
      Refusal: it is too long, or does not come in time, or is not JSON by its headers.
      Gone: the client left.
    """
    headers = dict(headers_of(scope))
    if headers.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
        raise Refusal(415, "Expected the header Content-Type: application/json.")
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise Refusal(415, "Expected a body without Content-Encoding.")
    content = bytearray()  # bytes would be copied with every packet
    try:
        async with asyncio.timeout(limits.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                content += message.get("body", b"")
                if len(content) > limits.body_bytes:
                    raise Refusal(413, f"The body is longer than --body-bytes {limits.body_bytes}.")
                if not message.get("more_body", False):
                    return bytes(content)
    except TimeoutError:
        raise Refusal(408, f"The body took longer than --body-seconds {limits.body_seconds:g}.") from None


async def left(receive: Receive) -> None:
    """Until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def headers_of(scope: Scope) -> list[tuple[bytes, bytes]]:
    """Names in small letters and values, as often as they came."""
    return [(name.lower(), value) for name, value in scope["headers"]]


def key_of(headers: list[tuple[bytes, bytes]]) -> bytes | None:
    """The key of a request: a bearer's, or the password of a browser."""
    found = [value for name, value in headers if name == b"authorization"]
    if len(found) != 1:
        return None
    scheme, _, value = found[0].partition(b" ")
    if scheme.lower() == b"bearer":
        return value
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except (ValueError, binascii.Error):
            return None
    return None


async def reply(
    send: Send,
    status: int,
    value: Any,
    kind: bytes = b"application/json",
    retry: int = 0,
    more: Sequence[tuple[bytes, bytes]] = (),
) -> int:
    """Answer with a JSON value, or bytes of another kind.

    Args:
      retry: seconds after which it is worth trying again; 0 says nothing of it.
    """
    body = value if isinstance(value, bytes) else as_json(value)
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *more]
    if retry:
        headers.append((b"retry-after", str(retry).encode()))
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="milora_jax", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
    return status


async def try_to_refuse(send: Send, refusal: Refusal) -> None:
    """Say no, to whoever is still there to hear it."""
    with contextlib.suppress(Gone):
        await reply(send, refusal.status, refusal.body, retry=refusal.retry_after)


async def send_event(send: Send, value: Any) -> None:
    """A server-sent event."""
    await send(
        {"type": "http.response.body", "body": b"data: " + as_json(value) + b"\n\n", "more_body": True}
    )
