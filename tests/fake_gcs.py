"""A server that answers a reader as Google Cloud Storage does: it lists, and gives ranges of objects."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "fake-bucket"


class FakeStorage:
    """Objects of one bucket, and what was asked of them.

    Attributes:
      objects: contents by name.
      generations: versions by name, 1 for those that are not named.
      asked: (object, range as the header gives it or None) of every read.
      refuse: status of all answers, 0 for honest ones.
      failures: statuses of the next answers.
      cut: how many of the next bodies end half way.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.generations: dict[str, int] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.refuse = 0
        self.failures: list[int] = []
        self.cut = 0

    def upload(self, directory: Path, prefix: str) -> None:
        """Take the files of a directory."""
        for path in directory.iterdir():
            self.objects[f"{prefix}/{path.name}"] = path.read_bytes()

    def answer(self, target: str, asked: str | None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        if self.failures:
            return self.failures.pop(0), {}, b""
        address = urlsplit(target)
        front = f"/storage/v1/b/{BUCKET}/o"
        if self.refuse or not address.path.startswith(front):
            return self.refuse or 404, {}, b""
        if address.path == front:
            query = {name: values[0] for name, values in parse_qs(address.query).items()}
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


@contextmanager
def serving(storage: FakeStorage) -> Iterator[str]:
    """The address of a server of the storage, for ``TENSORSTORE_GCS_HTTP_URL``."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, headers, body = storage.answer(self.path, self.headers.get("Range"))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body and storage.cut:
                storage.cut -= 1
                body, self.close_connection = body[: len(body) // 2], True
            self.wfile.write(body)

        def log_message(self, format: str, *values: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
