"""From a parsed request to the pieces of its answer: tokens, turns, text. Runs in the event loop's thread."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, ExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from milora_jax.data.chat import encode_chat
from milora_jax.errors import UserError
from milora_jax.generation.engine import Engine
from milora_jax.generation.request import TokenLogprobs
from milora_jax.generation.settings import GenerationSettings
from milora_jax.generation.stream import TextStream
from milora_jax.generation.text import prompt_ids
from milora_jax.prompt_format import PromptFormat
from milora_jax.serving.door import Door
from milora_jax.serving.keys import Tenant
from milora_jax.serving.limits import Limits
from milora_jax.serving.loop import DeviceLoop, Job, News
from milora_jax.serving.metrics import Metrics
from milora_jax.serving.refusal import bad_request, internal, no_such_model, overloaded
from milora_jax.serving.registry import Registered
from milora_jax.serving.schema import Chat, Completion
from milora_jax.serving.store import AdapterStore, Entry
from milora_jax.types import EXPERTS

COMPLETION_TOKENS = 16
"""Longest completion where none is given, as OpenAI has it; of a chat it is what the context leaves."""


@dataclass(frozen=True)
class Piece:
    """Some more of one sample.

    Attributes:
      text: that can be shown.
      tokens, logprobs: that came since the piece before; of a stop token too.
      finish: "stop" or "length" with the last piece.
      route: of the prompt, with the first piece.
    """

    sample: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish: str | None
    route: np.ndarray | None = None


@dataclass(frozen=True)
class Turn:
    """A request that has been begun.

    Attributes:
      model: as it was asked for.
      prompt_tokens: of the prompt.
      pieces: what comes; to be read to its end.
    """

    id: str
    model: str
    prompt_tokens: int
    pieces: AsyncIterator[Piece]
    created: int = field(default_factory=lambda: int(time.time()))


class Backend(Protocol):
    """What stands behind HTTP: a :class:`Service` of this process, or several of others.

    Attributes:
      door: who is let in here.
      metrics: where requests are counted here.
    """

    limits: Limits
    door: Door
    metrics: Metrics

    def models(self, tenant: Tenant) -> list[str]:
        """Names that a tenant may ask for."""
        ...

    def turn(self, tenant: Tenant, asked: Completion | Chat) -> AbstractAsyncContextManager[Turn]:
        """Begin a request that the door has let in; leaving ends whatever of it still goes on.

        Raises:
          Refusal: it is not served.
        """
        ...

    def say(self, token: int) -> str:
        """The text of one token."""
        ...

    async def load(self, name: str, registered: Registered) -> None:
        """Offer an adapter.

        Raises:
          UserError, OSError: it cannot be; what was offered before stays so.
        """
        ...

    async def unload(self, name: str) -> bool:
        """Offer an adapter no more; False if none of that name was."""
        ...

    async def state(self) -> tuple[bool, int]:
        """Whether requests can be served, and how many rows are free."""
        ...

    async def figures(self) -> bytes:
        """All counters, in Prometheus' format."""
        ...


class Service:
    """What a server does, without HTTP.

    Args:
      base_name: under which the base alone is offered; empty where it is not.
      tokenizers: two of the same: threads must not share one, and this room has two.
    """

    def __init__(
        self,
        engine: Engine,
        loop: DeviceLoop,
        store: AdapterStore | None,
        tokenizers: tuple[Any, Any],
        base_name: str,
        limits: Limits,
        metrics: Metrics,
    ) -> None:
        self.engine, self.loop, self.store, self.limits = engine, loop, store, limits
        self.metrics, self.base_name = metrics, base_name
        self.door = Door(limits)
        self._encoder, self._decoder = tokenizers
        self._said: dict[int, str] = {}  # at most the vocabulary
        longest = max(map(len, self._encoder.get_vocab()), default=1)
        self._most_characters = longest * engine.slots
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encode")

    def models(self, tenant: Tenant) -> list[str]:
        """Names that a tenant may ask for."""
        names = self.store.names() if self.store is not None else []
        mine = [name for name in names if tenant.may_use(name)]
        return [*([self.base_name] if self._serves_base(tenant) else []), *mine]

    @asynccontextmanager
    async def turn(self, tenant: Tenant, asked: Completion | Chat) -> AsyncIterator[Turn]:
        """Begin a request that the door has let in; leaving ends whatever of it still goes on.

        Raises:
          Refusal: it is not served.
        """
        with self._held(tenant, asked.model) as entry:
            self._require_short(asked)
            ids = await asyncio.get_running_loop().run_in_executor(
                self._encoding, self._encode, asked, PromptFormat() if entry is None else entry.prompt_format
            )
            default = COMPLETION_TOKENS if isinstance(asked, Completion) else 0
            settings = asked.settings(self.limits, len(ids), self.engine.slots, default)
            try:
                self.engine.check(ids, settings)
            except UserError as error:
                raise bad_request(f"{error}.") from None
            kind = "chatcmpl" if isinstance(asked, Chat) else "cmpl"
            with ExitStack() as waiting:
                waiting.enter_context(self.door.waiting(tenant, len(ids)))
                self.door.spend(tenant, len(ids) + settings.max_new_tokens * settings.num_samples)
                async with aclosing(self._pieces(tenant, entry, ids, settings, waiting.close)) as pieces:
                    yield Turn(f"{kind}-{secrets.token_hex(16)}", asked.model, len(ids), pieces)

    def say(self, token: int) -> str:
        """The text of one token."""
        text = self._said.get(token)
        if text is None:
            text = self._said[token] = self._decoder.decode([token])
        return text

    async def load(self, name: str, registered: Registered) -> None:
        """Read an adapter, check it, and offer it: see ``AdapterStore.load``."""
        if self.store is None:
            raise UserError("a server that was started without adapters has no place for one")
        await asyncio.to_thread(self.store.load, name, registered.path, registered.pinned)

    async def unload(self, name: str) -> bool:
        """Offer an adapter no more; False if none of that name was."""
        return self.store is not None and self.store.unload(name)

    async def state(self) -> tuple[bool, int]:
        """Whether the device loop runs, and how many rows are free."""
        return self.loop.alive, self.loop.counts.free_slots

    async def figures(self) -> bytes:
        """All counters, in Prometheus' format."""
        return self.metrics.text()

    def close(self) -> None:
        """Let nobody in any more."""
        self.door.closed = True

    def _serves_base(self, tenant: Tenant) -> bool:
        return bool(self.base_name) and (tenant.adapters is None or self.base_name in tenant.adapters)

    @contextmanager
    def _held(self, tenant: Tenant, name: str) -> Iterator[Entry | None]:
        """The adapter of a model's name, which cannot go until its job has taken it over."""
        if name == self.base_name and self._serves_base(tenant):
            yield None
            return
        entry = self.store.hold(name) if self.store is not None and tenant.may_use(name) else None
        if entry is None or self.store is None:
            raise no_such_model(name)
        try:
            yield entry
        finally:
            self.store.release(entry)
            self.loop.poke()

    def _require_short(self, asked: Completion | Chat) -> None:
        """Refuse what cannot fit, whatever tokens it is made of, before it is cut into tokens."""
        texts = [message.content for message in asked.messages] if isinstance(asked, Chat) else [asked.prompt]
        if sum(len(text) for text in texts if isinstance(text, str)) > self._most_characters:
            raise bad_request(
                f"This model has a context of {self.engine.slots} tokens (--context): "
                "the prompt is far longer.",
                "messages" if isinstance(asked, Chat) else "prompt",
                "context_length_exceeded",
            )

    def _encode(self, asked: Completion | Chat, written: PromptFormat) -> list[int]:
        """Ids of a prompt, as the adapter was trained on them.

        As in vLLM, special tokens are read in the prompt of a completion, which its client has written out,
        and never in the contents of a chat, which somebody else may have typed.
        """
        try:
            if isinstance(asked, Chat):
                return encode_chat(self._encoder, asked.chat(self.limits), time=written.time)
            return prompt_ids(self._encoder, asked.prompt, written, parse_special_tokens=True)
        except UserError as error:
            raise bad_request(f"{error}.") from None

    async def _pieces(
        self,
        tenant: Tenant,
        entry: Entry | None,
        ids: Sequence[int],
        settings: GenerationSettings,
        begun: Callable[[], None],
    ) -> AsyncGenerator[Piece]:
        """Submit, and turn what comes into text until every sample has ended.

        Args:
          begun: called when the prompt waits no more.
        """
        events = asyncio.get_running_loop()
        came: asyncio.Queue[News] = asyncio.Queue()
        job = Job(
            tenant.name,
            entry,
            tuple(ids),
            settings,
            lambda news: events.call_soon_threadsafe(came.put_nowait, news),
        )
        samples = range(settings.num_samples)
        texts = [TextStream(self._decoder, settings.stop) for _ in samples]
        open_samples, new_tokens = set(samples), 0
        start, last = time.monotonic(), 0.0
        try:
            self.loop.submit(job)
        except RuntimeError:
            raise overloaded("The server is stopping.") from None
        try:
            news = await came.get()
            begun()
            self.metrics.first_token.observe(time.monotonic() - start)
            while True:
                if news.finish in ("error", "cancelled"):
                    raise internal()
                now = time.monotonic()
                if last and news.tokens:
                    self.metrics.between_tokens.observe((now - last) / len(news.tokens))
                last = now
                if news.route is not None:
                    self._note_route(news.route)
                if news.sample in open_samples:
                    piece = self._piece(job, texts[news.sample], news)
                    new_tokens += len(piece.tokens)
                    if piece.finish is not None:
                        open_samples.discard(news.sample)
                    yield piece
                if not open_samples:
                    return
                news = await came.get()
        finally:
            for sample in open_samples:
                self.loop.end(job, sample, "cancelled")
            self.metrics.tokens.labels(tenant.name, "prompt").inc(len(ids))
            self.metrics.tokens.labels(tenant.name, "completion").inc(new_tokens)

    def _note_route(self, route: np.ndarray) -> None:
        for layer, weights in enumerate(route):
            for expert, weight in zip(EXPERTS, weights, strict=True):
                self.metrics.experts.labels(str(layer), expert).inc(float(weight))

    def _piece(self, job: Job, text: TextStream, news: News) -> Piece:
        """The text of some tokens; a stop string ends the sample here, and the loop hears of it."""
        ends = news.finish == "stop"
        shown = news.tokens[:-1] if ends else news.tokens
        before = len(text.tokens)
        fresh = text.add(shown, last=news.finish is not None)
        if not text.stopped:
            return Piece(news.sample, fresh, news.tokens, news.logprobs, news.finish, news.route)
        if news.finish is None:
            self.loop.end(job, news.sample, "stop")
        kept = len(text.tokens) - before
        return Piece(news.sample, fresh, news.tokens[:kept], news.logprobs[:kept], "stop", news.route)
