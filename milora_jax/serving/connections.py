"""Time limits of a connection that uvicorn does not have: for the head of a request, and for slow readers.

uvicorn waits without end for a client that sends a byte now and then, or that reads nothing of a response
that is complete for the application. A wrapper around its protocol closes such connections; it uses nothing
but the interface of :class:`asyncio.Protocol`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from milora_jax.serving.limits import Limits


class Connections:
    """The open connections of a server, by the address of the client."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._open: dict[Any, TimedConnection] = {}

    def protocol(self, http: Callable[..., Any]) -> Callable[..., asyncio.Protocol]:
        """Return a factory of connections, given uvicorn's own."""

        def make(**arguments: Any) -> asyncio.Protocol:
            return TimedConnection(http(**arguments), self._limits, self._open)

        return make

    def tracked(self, app: ASGIApp) -> ASGIApp:
        """Wrap an application so that each connection knows when a request begins and its response ends."""

        async def tracked(scope: Scope, receive: Receive, send: Send) -> None:
            connection = self._open.get(scope["client"])
            if connection is None:  # the client has disconnected already
                await app(scope, receive, send)
                return
            with contextlib.ExitStack() as active:
                connection.begin_request()
                active.callback(connection.end_request)

                async def tracked_send(message: Message) -> None:
                    await send(message)
                    if message["type"] == "http.response.body" and not message.get("more_body"):
                        active.close()

                await app(scope, receive, tracked_send)

        return tracked


class TimedConnection(asyncio.Protocol):
    """A connection that is closed when no request begins in time, or when its client does not read.

    Args:
      http: the protocol that handles the connection.
      opened: where the connection registers itself.
    """

    def __init__(self, http: asyncio.Protocol, limits: Limits, opened: dict[Any, TimedConnection]) -> None:
        self._http, self._limits, self._opened = http, limits, opened
        self._loop = asyncio.get_running_loop()
        self._active = 0
        self._waits_for_head: asyncio.TimerHandle | None = None
        self._waits_for_reader: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start the time limit for a request."""
        self._transport = transport
        self._client = tuple(transport.get_extra_info("peername")[:2])
        self._opened[self._client] = self
        transport.set_write_buffer_limits(high=self._limits.unread_bytes)
        self._http.connection_made(transport)
        self._expect_request()

    def data_received(self, data: bytes) -> None:
        """Start the time limit at the first byte of a request, or of a body that no request reads."""
        self._expect_request()
        self._http.data_received(data)

    def eof_received(self) -> bool | None:
        """Pass the end of the input to the HTTP protocol."""
        return self._http.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers."""
        self._opened.pop(self._client, None)
        _cancel(self._waits_for_head)
        _cancel(self._waits_for_reader)
        self._http.connection_lost(exc)

    def pause_writing(self) -> None:
        """Start the time limit for reading, because more than the limit waits for the client."""
        self._http.pause_writing()
        self._expect_reader()

    def resume_writing(self) -> None:
        """Stop the time limit for reading, because the client has read enough."""
        _cancel(self._waits_for_reader)
        self._http.resume_writing()

    def begin_request(self) -> None:
        """Note that a request has begun: its head is complete, and its body has its own time limit."""
        self._active += 1  # a second one can begin before the first has ended, where requests are pipelined
        _cancel(self._waits_for_head)
        self._waits_for_head = None

    def end_request(self) -> None:
        """Note that a request has ended; uvicorn closes the connection if no bytes follow."""
        self._active -= 1

    def _expect_request(self) -> None:
        if self._active == 0 and self._waits_for_head is None:
            self._waits_for_head = self._loop.call_later(self._limits.header_seconds, self._transport.abort)

    def _expect_reader(self) -> None:
        unread = self._transport.get_write_buffer_size()
        self._waits_for_reader = self._loop.call_later(
            self._limits.write_seconds, self._require_progress, unread
        )

    def _require_progress(self, before: int) -> None:
        if self._transport.get_write_buffer_size() >= before:
            self._transport.abort()
        else:
            self._expect_reader()


def _cancel(timer: Any) -> None:  # asyncio's TimerHandle, or uvloop's
    if timer is not None:
        timer.cancel()
