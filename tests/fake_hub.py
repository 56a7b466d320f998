"""A server that answers the requests of huggingface_hub as the Hugging Face Hub does."""

import base64
import hashlib
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from tests.http_servers import in_a_thread

TOKEN = "hf_of_the_tests"


class Hub:
    """Repositories, and what was asked for.

    Attributes:
      repositories: the commits of each, as its files by name; the last one is ``main``.
      gated, private: names of repositories that answer so to those without a token.
      status: answered to everything, where it is not 0.
      fetched: names of the files that were downloaded.
      made: name of each new repository, and whether it is private.
    """

    def __init__(self):
        self.repositories, self.gated, self.private = {}, set(), set()
        self.status, self.fetched, self.made = 0, [], []

    def commit(self, name, files):
        self.repositories.setdefault(name, [{}]).append(dict(files))
        return self.sha(name, len(self.repositories[name]) - 1)

    def sha(self, name, number):
        return hashlib.sha1(f"{name} {number}".encode()).hexdigest()

    def number_of(self, name, revision):
        """Number of the commit of a revision; None where there is none."""
        count = len(self.repositories[name])
        known = {"main": count - 1, **{self.sha(name, i): i for i in range(count)}}
        return known.get(revision)

    def files(self, name):
        return self.repositories[name][-1]


class Handler(BaseHTTPRequestHandler):
    """The requests that fetching and pushing an adapter make."""

    hub: Hub

    def log_message(self, *given):
        pass

    def answer(self, status, content=b"", **headers):
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {**headers, "Content-Type": "application/json"}
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refused(self, status, code, said=""):
        self.answer(status, {"error": said or code}, X_Error_Code=code, X_Error_Message=said or code)

    def split(self, place, kind):
        """The repository of a path, and what follows it; answers where the client may not see it."""
        parts = place.split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        owned = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if name not in self.hub.repositories or (name in self.hub.private and not owned):
            return self.refused(401 if not owned else 404, "RepoNotFound", "Repository not found")
        if name in self.hub.gated and not owned:
            return self.refused(403, "GatedRepo", "Access to model is restricted")
        assert rest[0] == kind or kind == "", self.path
        return name, rest

    def read_body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        if self.hub.status:
            return self.refused(self.hub.status, "", "the Hub rests")
        path = unquote(urlsplit(self.path).path).strip("/")
        if not path.startswith("api/models/"):
            return self.file(path)
        if (found := self.split(path.removeprefix("api/models/"), "")) is None:
            return None
        name, rest = found
        number = self.hub.number_of(name, "/".join(rest[1:]) if rest else "main")
        if number is None:
            return self.refused(404, "RevisionNotFound", "Invalid rev id")
        files = self.hub.repositories[name][number]
        if rest and rest[0] == "tree":
            return self.answer(
                200,
                [
                    {
                        "type": "file",
                        "path": each,
                        "size": len(content),
                        "oid": hashlib.sha1(content).hexdigest(),
                    }
                    for each, content in files.items()
                ],
            )
        return self.answer(
            200,
            {
                "id": name,
                "sha": self.hub.sha(name, number),
                "private": name in self.hub.private,
                "siblings": [{"rfilename": each} for each in files],
            },
        )

    def file(self, path):
        if (found := self.split(path, "resolve")) is None:
            return None
        name, (_, revision, *parts) = found
        number, file = self.hub.number_of(name, revision), "/".join(parts)
        content = self.hub.repositories[name][number].get(file)
        if content is None:
            return self.refused(404, "EntryNotFound")
        if self.command == "GET":
            self.hub.fetched.append(file)
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self.answer(200, content, ETag=etag, X_Repo_Commit=self.hub.sha(name, number))

    def do_POST(self):
        body = self.read_body()
        if self.hub.status:
            return self.refused(self.hub.status, "", "the Hub rests")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refused(401, "", "Invalid username or password.")
        path = unquote(urlsplit(self.path).path).removeprefix("/api/")
        if path == "repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            url = f"http://{self.headers['Host']}/{name}"
            if name in self.hub.repositories:
                return self.answer(409, {"error": "You already created this model repo", "url": url})
            private = asked.get("private", False) or asked.get("visibility") == "private"  # by version
            self.hub.made.append((name, private))
            self.hub.repositories[name] = [{}]
            return self.answer(200, {"url": url, "name": name})
        if path == "validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if (found := self.split(path.removeprefix("models/"), "")) is None:
            return None
        name, (kind, revision) = found
        assert revision == "main"
        if kind == "preupload":
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for each in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        assert kind == "commit"
        files = dict(self.hub.files(name))
        for line in body.decode().splitlines():
            each = json.loads(line)
            if each["key"] == "file":
                files[each["value"]["path"]] = base64.b64decode(each["value"]["content"])
            if each["key"] == "deletedFile":
                del files[each["value"]["path"]]
        sha = self.hub.commit(name, files)
        url = f"http://{self.headers['Host']}/{name}/commit/{sha}"
        return self.answer(200, {"success": True, "commitOid": sha, "commitUrl": url})


@contextmanager
def serving_hub():
    """A hub and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    with in_a_thread(server) as port:
        yield hub, f"http://127.0.0.1:{port}"
