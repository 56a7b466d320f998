"""HTTP: who may ask what, bodies within their limits, and answers whole or as server-sent events.

A plain ASGI application. Whether a request has a right to be here is decided on the raw path as it came,
before anything else looks at it: every path but ``/health/live`` needs a key.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from milora_jax.data.prompts import prompt_text
from milora_jax.data.records import Record
from milora_jax.errors import UserError
from milora_jax.serving.answers import Writer, as_json
from milora_jax.serving.keys import Keyring, Tenant
from milora_jax.serving.openapi import document
from milora_jax.serving.refusal import Refusal, bad_request, forbidden, internal, no_key
from milora_jax.serving.registry import Registry
from milora_jax.serving.schema import Chat, Completion, NamedAdapter, parse
from milora_jax.serving.service import Backend, Turn
from milora_jax.serving.trace import log_error
from milora_jax.serving.wire import (
    Gone,
    Receive,
    Scope,
    Send,
    headers_of,
    key_of,
    left,
    read_body,
    reply,
    send_event,
    try_to_refuse,
)

log = logging.getLogger("milora_jax.serving")

NOBODY, ADMIN, MONITOR = Tenant("nobody"), Tenant("admin"), Tenant("monitor")
"""Who asks for what is open, and an administrator and a monitor who are no tenants."""

OPEN_PATH = b"/health/live"
"""The one path that needs no key."""

FIGURES = "/metrics"
"""The path that not every tenant may ask for."""

WATCHED = (FIGURES, "/health/ready", "/health/live")
"""All that a monitor may ask for."""

Route = Callable[[Scope, Receive, Send, Tenant], Awaitable[int]]
"""Answers, and tells the status."""

PLACE = "\N{OBJECT REPLACEMENT CHARACTER}"

FOLDER = Path(__file__).parent / "page"

PAGE = {
    "/": ("index.html", b"text/html; charset=utf-8"),
    "/page.css": ("page.css", b"text/css; charset=utf-8"),
    "/page.js": ("page.js", b"text/javascript; charset=utf-8"),
}
"""The page for trying adapters, by path: the files of a fixed list, whatever is asked for."""

PAGE_HEADERS = [
    (b"content-security-policy", b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]

DONE = b"data: [DONE]\n\n"


class App:
    """The application.

    Args:
      keys: of the tenants and the admins.
      registry: of the adapters that an admin may load.
      hosts: names by which the server may be called; empty for any.
    """

    def __init__(
        self,
        service: Backend,
        keys: Keyring,
        registry: Registry,
        hosts: frozenset[str] = frozenset(),
    ) -> None:
        self.service, self._keys, self._registry, self._hosts = service, keys, registry, hosts
        self.routes: dict[tuple[str, str], Route] = {
            ("GET", "/health/live"): self._live,
            ("GET", "/health/ready"): self._ready,
            ("GET", FIGURES): self._metrics,
            ("GET", "/openapi.json"): self._document,
            **{("GET", path): self._page for path in PAGE},
            ("GET", "/v1/models"): self._models,
            ("POST", "/v1/completions"): self._completions,
            ("POST", "/v1/chat/completions"): self._chat,
        }
        self.admin_routes: dict[tuple[str, str], Route] = {
            ("POST", "/v1/load_lora_adapter"): self._load,
            ("POST", "/v1/unload_lora_adapter"): self._unload,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            raise RuntimeError(f"no service of type {scope['type']}")
        tenant, began = NOBODY, False

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal began
            began = True
            try:
                # Not wait_for: Python 3.11's forgets that it was cancelled where the sending is just done.
                async with asyncio.timeout(self.service.limits.write_seconds):
                    await send(message)
            except (TimeoutError, OSError):
                raise Gone from None

        try:
            tenant, route = self._allowed(scope)
            status = await route(scope, receive, watched, tenant)
        except Gone:
            status = 499
        except Refusal as refusal:
            status = refusal.status
            await try_to_refuse(watched, refusal)
        except Exception as error:
            log_error("a request failed", error)
            status = 500
            if not began:
                await try_to_refuse(watched, internal())
        self.service.metrics.requests.labels(tenant.name, str(status)).inc()

    def _allowed(self, scope: Scope) -> tuple[Tenant, Route]:
        """Who asks, and what answers.

        Raises:
          Refusal: whoever it is may not, or there is nothing of that name.
        """
        headers = headers_of(scope)
        size = len(scope["raw_path"]) + sum(len(name) + len(value) + 4 for name, value in headers)
        limits = self.service.limits
        # uvicorn bounds a head that comes bit by bit; one that comes at once it takes whatever its size.
        if size > limits.header_bytes or len(headers) > limits.headers:
            most = f"--headers {limits.headers}, --header-bytes {limits.header_bytes}"
            raise Refusal(431, f"The head of the request is too long: at most {most}.")
        self._require_host(headers)
        raw = scope["raw_path"]
        asked = (scope["method"], raw.decode("latin-1"))
        tenant, admin = NOBODY, False
        if raw != OPEN_PATH:
            key = key_of(headers)
            found, admin, monitor = (
                self._keys.tenant_of(key),
                self._keys.is_admin(key),
                self._keys.is_monitor(key),
            )
            if found is None and not admin and not monitor:
                client = scope.get("client") or ("", 0)
                raise self.service.door.wrong_key(client[0]) or no_key()
            tenant = found or (ADMIN if admin else MONITOR)
            hidden = asked[1] == FIGURES and not self._keys.may_watch(key)
            if hidden or (tenant is MONITOR and asked[1] not in WATCHED):
                raise forbidden()
        if asked in self.admin_routes:
            if not admin:
                raise forbidden()
            return tenant, self.admin_routes[asked]
        if asked in self.routes:
            return tenant, self.routes[asked]
        if asked[1] in {path for _, path in (*self.routes, *self.admin_routes)}:
            raise Refusal(405, "This path has no such method.")
        raise Refusal(404, "There is no such path.")

    def _require_host(self, headers: list[tuple[bytes, bytes]]) -> None:
        named = [value for name, value in headers if name == b"host"]
        if len(named) != 1:
            raise bad_request("Expected one Host header.")
        host = named[0].decode("latin-1").lower()
        name = host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.split(":")[0]
        if not all(letter.isalnum() or letter in ".-_:[]" for letter in host):
            raise bad_request("The Host header holds what no name has.")
        if self._hosts and name not in self._hosts:
            raise bad_request("The Host header names another server.")

    async def _live(self, scope: Scope, receive: Receive, send: Send, tenant: Tenant) -> int:
        return await reply(send, 200, {"status": "alive"})

    async def _ready(self, scope: Scope, receive: Receive, send: Send, tenant: Tenant) -> int:
        alive, free = await self.service.state()
        door = self.service.door
        ready = alive and not door.closed
        state = {
            "status": "ready" if ready else "not ready",
            "free_slots": free,
            "under_way": door.under_way,
        }
        return await reply(send, 200 if ready else 503, state)

    async def _metrics(self, scope: Scope, receive: Receive, send: Send, tenant: Tenant) -> int:
        text = await self.service.figures()
        return await reply(send, 200, text, b"text/plain; version=0.0.4; charset=utf-8")

    async def _document(self, scope: Scope, receive: Receive, send: Send, tenant: Tenant) -> int:
        return await reply(send, 200, document())

    async def _page(self, scope: Scope, receive: Receive, send: Send, tenant: Tenant) -> int:
        name, kind = PAGE[scope["raw_path"].decode("latin-1")]
        content = await asyncio.to_thread((FOLDER / name).read_bytes)
        if name == "page.js":
            # The words that train.py puts around an instruction are the records' own, not the page's.
            before, _, after = prompt_text(Record(PLACE, "", "", "")).partition(PLACE)
            content = b"const INSTRUCTION = " + as_json([before, after]) + b";\n" + content
        return await reply(send, 200, content, kind, more=PAGE_HEADERS)

    async def _models(self, scope: Scope, receive: Receive, send: Send, tenant: Tenant) -> int:
        models = [
            {"id": name, "object": "model", "created": 0, "owned_by": "milora_jax"}
            for name in self.service.models(tenant)
        ]
        return await reply(send, 200, {"object": "list", "data": models})

    async def _completions(self, scope: Scope, receive: Receive, send: Send, tenant: Tenant) -> int:
        with self.service.door.entered(tenant):
            asked = parse(Completion, await read_body(scope, receive, self.service.limits))
            return await self._answer(asked, receive, send, tenant)

    async def _chat(self, scope: Scope, receive: Receive, send: Send, tenant: Tenant) -> int:
        with self.service.door.entered(tenant):
            asked = parse(Chat, await read_body(scope, receive, self.service.limits))
            if asked.max_completion_tokens is not None:
                asked = asked.model_copy(update={"max_tokens": asked.max_completion_tokens})
            return await self._answer(asked, receive, send, tenant)

    async def _answer(self, asked: Completion | Chat, receive: Receive, send: Send, tenant: Tenant) -> int:
        async with self.service.turn(tenant, asked) as turn:
            writer = Writer(asked, turn, self.service.say)
            answering = self._stream if asked.stream else self._whole
            work = asyncio.ensure_future(answering(writer, turn, send))
            leaving = asyncio.ensure_future(left(receive))
            try:
                await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    raise Gone
                return work.result()
            finally:
                for task in (work, leaving):
                    task.cancel()
                await asyncio.gather(work, leaving, return_exceptions=True)

    async def _whole(self, writer: Writer, turn: Turn, send: Send) -> int:
        async for piece in turn.pieces:
            writer.add(piece)
        return await reply(send, 200, writer.whole())

    async def _stream(self, writer: Writer, turn: Turn, send: Send) -> int:
        """Events as they come. An error after the first one is an event too: the status has been sent."""
        pieces = turn.pieces
        first = await anext(pieces)
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for event in writer.first():
            await send_event(send, event)
        try:
            await send_event(send, writer.chunk(first))
            async for piece in pieces:
                chunk = writer.chunk(piece)  # its tokens count, whether or not there is a text to send
                if piece.text or piece.finish or piece.logprobs:
                    await send_event(send, chunk)
            for event in writer.last():
                await send_event(send, event)
            await send({"type": "http.response.body", "body": DONE, "more_body": False})
        except Refusal as refusal:
            await send_event(send, refusal.body)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return refusal.status
        return 200

    async def _load(self, scope: Scope, receive: Receive, send: Send, tenant: Tenant) -> int:
        name = parse(NamedAdapter, await read_body(scope, receive, self.service.limits)).lora_name
        registered = self._registry.get(name)
        if registered is None:
            raise Refusal(404, f"No adapter is registered as {name!r}.", code="adapter_not_found")
        try:
            await self.service.load(name, registered)
            await asyncio.to_thread(self._registry.note, name, True)
        except (UserError, OSError) as error:
            log.warning("adapter %s was not loaded: %s", name, error)
            raise bad_request("The adapter cannot be loaded; the server's log says why.") from None
        return await reply(send, 200, {"status": "loaded", "lora_name": name})

    async def _unload(self, scope: Scope, receive: Receive, send: Send, tenant: Tenant) -> int:
        name = parse(NamedAdapter, await read_body(scope, receive, self.service.limits)).lora_name
        if not await self.service.unload(name):
            raise Refusal(404, f"No adapter is loaded as {name!r}.", code="adapter_not_found")
        await asyncio.to_thread(self._registry.note, name, False)
        return await reply(send, 200, {"status": "unloaded", "lora_name": name})
