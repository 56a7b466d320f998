"""Judges behind OpenAI's API, in threads."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.http_servers import in_a_thread


class Silence:
    """The content of an answer that was kept back."""


class Judge:
    """A judge in a thread.

    Args:
      replies: what to do with each request in turn, the last with all further ones: a text is an answer, a
        number a status, None silence.
    """

    def __init__(self, *replies):
        self.replies, self.asked, self.over = replies, [], threading.Event()
        self.headers = {}

    @contextlib.contextmanager
    def serving(self):
        judge, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                judge.headers = dict(self.headers)
                with lock:
                    reply = judge.replies[min(len(judge.asked), len(judge.replies) - 1)]
                    judge.asked.append((self.path, self.headers.get("Authorization"), body))
                if reply is None:
                    judge.over.wait()
                    return
                status = reply if isinstance(reply, int) else 200
                said = None if isinstance(reply, Silence) else reply
                content = {"choices": [{"message": {"role": "assistant", "content": said}}]}
                if status != 200:
                    content = {"error": {"message": "busy"}}
                sent = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(sent)))
                if status == 302:
                    self.send_header("Location", "/elsewhere")
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        with in_a_thread(server) as port:
            try:
                yield f"http://127.0.0.1:{port}/v1"
            finally:
                judge.over.set()
