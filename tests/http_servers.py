"""Servers of the standard library in threads, for the fakes of services that tests speak to."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import HTTPServer

SHUTDOWN_POLL = 0.02
"""Seconds between two looks at whether a server is to stop. The default of half a second adds up to a minute
over the tests."""


@contextmanager
def in_a_thread(server: HTTPServer) -> Iterator[int]:
    """Let a server answer inside the block, in a thread of its own; the port that it listens on."""
    thread = threading.Thread(target=server.serve_forever, args=(SHUTDOWN_POLL,), daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
