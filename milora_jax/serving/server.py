"""Runs the application in uvicorn until a signal stops it."""

from __future__ import annotations

import ipaddress
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from milora_jax.errors import UserError
from milora_jax.serving.app import make_app
from milora_jax.serving.connections import Connections
from milora_jax.serving.keys import Keyring
from milora_jax.serving.limits import Limits
from milora_jax.serving.registry import Registry
from milora_jax.serving.service import Service

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
"""Host names of a server without keys, so that a page of another site cannot call it under its own name."""

MAX_CONNECTIONS = 1024


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Server(uvicorn.Server):
    """uvicorn's server, which refuses new requests as soon as it is told to stop."""

    def __init__(self, config: uvicorn.Config, closing: Callable[[], None]) -> None:
        super().__init__(config)
        self._closing = closing

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin a graceful shutdown; a second Ctrl-C stops at once.

        uvicorn's own handler raises the signal again in the end, and the exit code is not 0 then.
        """
        self._closing()
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def bound_socket(keys: Keyring, host: str, port: int) -> socket.socket:
    """Return a socket that is bound to its address but does not listen yet, before the base is loaded.

    Raises:
      UserError: the address needs keys and there are none, or it is in use.
    """
    if keys.open and not is_loopback(host):
        raise UserError(f"host {host!r} is not this machine alone, and there are no keys: give --keys FILE")
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        # The address of a server that has just ended can be used again.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
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


def uvicorn_config(app: ASGIApp, limits: Limits) -> uvicorn.Config:
    """Return uvicorn's configuration with the limits of a server, including those of ``connections.py``."""
    connections = Connections(limits)
    config = uvicorn.Config(
        connections.tracked(app),
        http="h11",
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=limits.header_bytes,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, int(limits.grace_seconds)),
    )
    config.load()
    config.http_protocol_class = connections.protocol(config.http_protocol_class)  # pyright: ignore
    return config


def make_server(service: Service, keys: Keyring, registry: Registry, bound: socket.socket) -> uvicorn.Server:
    """Return a server whose socket listens from now on.

    Raises:
      UserError: another process has begun to listen to the address since it was bound.
    """
    app = make_app(service, keys, registry, LOOPBACK_NAMES if keys.open else frozenset())
    config = uvicorn_config(app, service.limits)
    try:
        bound.listen(config.backlog)
    except OSError as error:
        host, port, *_ = bound.getsockname()
        raise _unusable(host, port, error) from None
    return _Server(config, service.close)


def serve(service: Service, keys: Keyring, registry: Registry, bound: socket.socket) -> int:
    """Serve until SIGTERM or SIGINT.

    Args:
      bound: from :func:`bound_socket`.

    Returns:
      The exit code: 0, or 1 if the device loop has ended, so that a supervisor restarts the process.

    Raises:
      UserError: as :func:`make_server`.
    """
    server = make_server(service, keys, registry, bound)
    service.loop.start()
    threading.Thread(target=_watch, args=(service, server), daemon=True).start()
    names = ", ".join(service.store.names()) if service.store is not None else "no adapters"
    models = f"{service.base_name or 'adapters'} ({names})"
    host, port, *_ = bound.getsockname()
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {models} on http://{shown}:{port}", file=sys.stderr, flush=True)
    server.run(sockets=[bound])
    failed = service.loop.error is not None
    service.loop.stop()
    return 1 if failed else 0


def _watch(service: Service, server: uvicorn.Server) -> None:
    """Stop the server when the device loop has ended."""
    while service.loop.error is None and not server.should_exit:
        time.sleep(0.2)
    server.should_exit = True
