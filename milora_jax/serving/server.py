"""HTTP by uvicorn around an application, until it is told to stop."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from milora_jax.errors import UserError
from milora_jax.serving.app import App
from milora_jax.serving.keys import Keyring
from milora_jax.serving.limits import Limits
from milora_jax.serving.registry import Registry
from milora_jax.serving.service import Service

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
"""What a server without keys may be called: a page of another site cannot ask it under a name of its own."""

CONNECTIONS = 1024


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def protocol_for(limits: Limits) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1 with a deadline for the head of a request, counted from its first byte, and one for
    clients who do not read.

    uvicorn itself waits for ever for a client who sends a byte now and then, or who takes none.
    """

    class Deadlined(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=limits.unread_bytes)
            self._expect_head()

        def data_received(self, data: bytes) -> None:
            if self.conn.their_state is h11.IDLE and self._deadline is None:
                self._expect_head()
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE and not self._answered():
                self._forget()
            elif self._deadline is None and self.timeout_keep_alive_task is None:
                # uvicorn forgets its own deadline with every byte, those of a body that nobody reads too.
                self._expect_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            self._forget_reader()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._forget_reader()
            self._wait_for_reader(self.transport.get_write_buffer_size())

        def resume_writing(self) -> None:
            self._forget_reader()
            super().resume_writing()

        def _wait_for_reader(self, unread: int) -> None:
            self._unread = self.loop.call_later(limits.write_seconds, self._look_at_unread, unread)

        def _look_at_unread(self, before: int) -> None:
            """Cut a client who has taken nothing; also of an answer that is over for everybody else."""
            left = self.transport.get_write_buffer_size()
            if left >= before:
                self.transport.abort()
            else:
                self._wait_for_reader(left)

        def _forget_reader(self) -> None:
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None

        def _answered(self) -> bool:
            return self.cycle is not None and self.cycle.response_complete

        def _expect_head(self) -> None:
            self._deadline = self.loop.call_later(limits.header_seconds, self._late)

        def _forget(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _late(self) -> None:
            self._deadline = None
            if self.conn.their_state is h11.IDLE or self._answered():
                self.transport.abort()

    return Deadlined


class _Server(uvicorn.Server):
    """uvicorn's, which refuses new requests from the moment it is told to stop."""

    def __init__(self, config: uvicorn.Config, closing: Callable[[], None]) -> None:
        super().__init__(config)
        self._closing = closing

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; a second Ctrl-C stops at once.

        uvicorn's own remembers the signal and dies of it in the end, for which a supervisor would blame us.
        """
        self._closing()
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def bound_socket(keys: Keyring, host: str, port: int) -> socket.socket:
    """A socket that has its address and does not listen yet: taken before a base is loaded for minutes.

    Raises:
      UserError: the address is not to be served without keys, or is taken.
    """
    if keys.open and not is_loopback(host):
        raise UserError(f"host {host!r} is not this machine alone, and there are no keys: give --keys FILE")
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of a server that has just ended
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise _unusable(host, port, error) from None
    return bound


def _unusable(host: str, port: int, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error)
    return UserError(
        f"port {port} of {host!r} cannot be listened to: {reason}; give another --port or --host"
    )


def make_server(service: Service, keys: Keyring, registry: Registry, bound: socket.socket) -> uvicorn.Server:
    """A server, which listens to a socket from now on.

    Raises:
      UserError: somebody else has begun to listen to the address since it was bound.
    """
    limits = service.limits
    app = App(service, keys, registry, LOOPBACK_NAMES if keys.open else frozenset())
    config = uvicorn.Config(
        app,
        http=protocol_for(limits),
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=limits.header_bytes,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, int(limits.grace_seconds)),
    )
    try:
        bound.listen(config.backlog)
    except OSError as error:
        host, port, *_ = bound.getsockname()
        raise _unusable(host, port, error) from None
    return _Server(config, service.close)


def serve(service: Service, keys: Keyring, registry: Registry, bound: socket.socket) -> int:
    """Serve until SIGTERM or SIGINT.

    Args:
      bound: of :func:`bound_socket`.

    Returns:
      The exit code: 0, or 1 where the device loop died, so that a supervisor starts anew.

    Raises:
      UserError: as :func:`make_server`.
    """
    server = make_server(service, keys, registry, bound)
    service.loop.start()
    threading.Thread(target=_watch, args=(service, server), daemon=True).start()
    names = ", ".join(service.store.names()) if service.store is not None else "no adapters"
    what = f"{service.base_name or 'adapters'} ({names})"
    host, port, *_ = bound.getsockname()
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {what} on http://{shown}:{port}", file=sys.stderr, flush=True)
    server.run(sockets=[bound])
    died = service.loop.error is not None
    service.loop.stop()
    return 1 if died else 0


def _watch(service: Service, server: uvicorn.Server) -> None:
    """Stop the server when the device loop dies: nothing it could answer would be true."""
    while service.loop.error is None and not server.should_exit:
        time.sleep(0.2)
    server.should_exit = True
