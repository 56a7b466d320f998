"""A server that answers as Google Cloud Storage does: it lists, reads ranges, and writes on conditions."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.http_servers import in_a_thread

BUCKET = "fake-bucket"

RESET = -1
"""In the place of a status: the connection is reset, and nothing is done."""

LOST = -2
"""In the place of a status: the request is served, and the connection is reset before the answer."""

CUT = -3
"""In the place of a status: the answer's body ends half way."""


class FakeStorage:
    """Objects of one bucket, and what was asked of them.

    Attributes:
      objects: contents by name.
      generations: versions by name, 1 for those that are not named.
      asked: (object, range as the header gives it or None) of every read.
      written: (method, object) of every write that was done, in order.
      refuse: status of all answers, 0 for honest ones.
      read_only: whether writes are refused.
      failures: statuses of the next answers, or RESET, LOST, CUT.
      cut: how many of the next bodies end half way.
      fault: called with the method before every answer; returns a status as in ``failures``, 0 for none.
      watch: called with the method and the object before and after every write; the last argument says which.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.generations: dict[str, int] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.written: list[tuple[str, str]] = []
        self.refuse = 0
        self.read_only = False
        self.failures: list[int] = []
        self.cut = 0
        self.fault: Callable[[str], int] = lambda method: 0
        self.watch: Callable[[str, str, bool], None] = lambda method, name, done: None
        self._newest = 10**15
        self._lock = threading.RLock()

    def upload(self, directory: Path, prefix: str) -> None:
        """Take the files of a directory and of those below it."""
        for path in directory.rglob("*"):
            if path.is_file():
                self.objects[f"{prefix}/{path.relative_to(directory).as_posix()}"] = path.read_bytes()

    def download(self, prefix: str, directory: Path) -> Path:
        """Write the objects below a prefix to files, as a person would copy them."""
        for name, content in dict(self.objects).items():
            if name.startswith(f"{prefix}/"):
                path = directory / name.removeprefix(f"{prefix}/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        return directory

    def answer(self, target: str, asked: str | None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a GET."""
        address = urlsplit(target)
        front = f"/storage/v1/b/{BUCKET}/o"
        if self.refuse or not address.path.startswith(front):
            return self.refuse or 404, {}, b""
        if address.path == front:
            query = _query(address.query)
            first, end = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
            items = [{"name": name} for name in sorted(self.objects) if first <= name < end]
            return 200, {}, json.dumps({"items": items}).encode()
        name = unquote(address.path.removeprefix(f"{front}/"))
        self.asked.append((name, asked))
        if name not in self.objects:
            return 404, {}, b""
        whole, headers = self.objects[name], {"x-goog-generation": str(self.generations.get(name, 1))}
        if asked is None:
            return 200, headers, whole
        start, _, last = asked.removeprefix("bytes=").partition("-")
        part = whole[int(start) : int(last) + 1]
        if not part:
            return 416, headers, b""
        headers["Content-Range"] = f"bytes {start}-{int(start) + len(part) - 1}/{len(whole)}"
        return 206, headers, part

    def change(self, method: str, target: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a POST that uploads, or of a DELETE."""
        address, upload = urlsplit(target), method == "POST"
        query, front = _query(address.query), f"{'/upload' if upload else ''}/storage/v1/b/{BUCKET}/o"
        if self.refuse or not address.path.startswith(front):
            return self.refuse or 404, {}, _said("The specified bucket does not exist.")
        if self.read_only:
            return 403, {}, _said("The account does not have storage.objects.create access.")
        name = query["name"] if upload else unquote(address.path.removeprefix(f"{front}/"))
        self.watch(method, name, False)
        with self._lock:
            present = self.generations.get(name, 1) if name in self.objects else 0
            if int(query.get("ifGenerationMatch", present)) != present:
                return 412, {}, _said("At least one of the pre-conditions you specified did not hold.")
            if not upload and not present:
                return 404, {}, _said("No such object.")
            self.written.append((method, name))
            if upload:
                self._newest += 1
                self.objects[name], self.generations[name] = body, self._newest
            else:
                del self.objects[name]
        self.watch(method, name, True)
        found = {"name": name, "bucket": BUCKET, "generation": str(self._newest), "size": str(len(body))}
        return (200, {}, json.dumps(found).encode()) if upload else (204, {}, b"")


@contextmanager
def in_reach(monkeypatch: Any, retries: int = 1) -> Iterator[FakeStorage]:
    """A storage that this process reaches as Google's, with so many quick retries."""
    storage = FakeStorage()
    delays = {"max_retries": retries, "initial_delay": "1ms", "max_delay": "1ms"}
    monkeypatch.setattr("milora_jax.base.gcs.RETRIES", delays)
    # No credentials are looked for on the network.
    monkeypatch.setenv("GCE_METADATA_ROOT", "127.0.0.1:1")
    with serving(storage) as address:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        yield storage


def _query(text: str) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(text).items()}


def _said(reason: str) -> bytes:
    return json.dumps({"error": {"message": reason}}).encode()


@contextmanager
def serving(storage: FakeStorage) -> Iterator[str]:
    """The address of a server of the storage, for ``TENSORSTORE_GCS_HTTP_URL``."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else every answer waits 40 ms for the end of its headers' way

        def serve(self) -> None:
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = storage.failures.pop(0) if storage.failures else storage.fault(self.command)
            if fault == RESET:
                self.reset()
                return
            if fault > 0:
                status, headers, body = fault, {}, b""
            elif self.command == "GET":
                status, headers, body = storage.answer(self.path, self.headers.get("Range"))
            else:
                status, headers, body = storage.change(self.command, self.path, sent)
            if fault == LOST:
                self.reset()
                return
            self.send_response(status)
            size = {} if status == 204 else {"Content-Length": str(len(body))}
            for name, value in {**headers, **size}.items():
                self.send_header(name, value)
            self.end_headers()
            if body and (storage.cut or fault == CUT):
                storage.cut -= fault != CUT
                body, self.close_connection = body[: len(body) // 2], True
            self.wfile.write(body)

        do_GET = do_POST = do_DELETE = serve

        def reset(self) -> None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True

        def log_message(self, format: str, *values: object) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """Say nothing: clients are killed, and connections reset."""

    with in_a_thread(Server(("127.0.0.1", 0), Handler)) as port:
        yield f"http://127.0.0.1:{port}"
