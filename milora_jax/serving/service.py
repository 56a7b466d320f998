"""From a validated request to the text of its samples. Runs in the thread of the event loop."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, ExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from milora_jax.data.scopes import EncodedPrompt, RouteScopeError, encode_messages
from milora_jax.errors import UserError
from milora_jax.generation.engine import Engine
from milora_jax.generation.request import TokenLogprobs
from milora_jax.generation.settings import GenerationSettings
from milora_jax.generation.stream import TextStream
from milora_jax.generation.text import prompt_ids
from milora_jax.prompt_format import PromptFormat
from milora_jax.serving.admission import AdmissionControl
from milora_jax.serving.api_errors import bad_request, internal_error, model_not_found, overloaded
from milora_jax.serving.jobs import Job, StreamEvent
from milora_jax.serving.keys import Tenant
from milora_jax.serving.limits import Limits
from milora_jax.serving.loop import DeviceLoop
from milora_jax.serving.metrics import Metrics
from milora_jax.serving.registry import Registered
from milora_jax.serving.requests import ChatRequest, CompletionRequest
from milora_jax.serving.responses import FinishReason
from milora_jax.serving.store import AdapterStore, AdapterVersion
from milora_jax.serving.structured import GrammarConstraint, Grammars, invalid_grammar
from milora_jax.serving.tools import Call, CallParser, ToolCalls
from milora_jax.types import EXPERTS

COMPLETION_TOKENS = 16
"""``max_tokens`` of a completion where none is given, as in OpenAI's API; a chat may fill the context."""

GenerationBody = CompletionRequest | ChatRequest


@dataclass(frozen=True)
class Delta:
    """What one sample has gained.

    Attributes:
      text: that can be shown.
      tokens, logprobs: since the previous delta; a stop token included.
      finish: "stop", "length" or "tool_calls" with the last delta.
      route: of the prompt, with the first delta.
      cached_tokens: prompt tokens that came from the prefix cache.
      calls: of tools, that are whole since the previous delta.
    """

    sample: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish: FinishReason | None
    route: np.ndarray | None = None
    cached_tokens: int = 0
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True)
class Generation:
    """A request that has been queued.

    Attributes:
      model: the name in the request.
      prompt_tokens: length of the prompt.
      deltas: of all samples, to be read to the end.
    """

    id: str
    model: str
    prompt_tokens: int
    deltas: AsyncIterator[Delta]
    created: int = field(default_factory=lambda: int(time.time()))


@runtime_checkable
class Backend(Protocol):
    """What the HTTP API calls: a :class:`Service` of this process, or replicas in others.

    Attributes:
      admission: admission control of this process.
      metrics: where requests are counted in this process.
    """

    limits: Limits
    admission: AdmissionControl
    metrics: Metrics

    def models(self, tenant: Tenant) -> list[str]:
        """Names of the models that a tenant may use."""
        ...

    def generate(self, tenant: Tenant, body: GenerationBody) -> AbstractAsyncContextManager[Generation]:
        """Queue an admitted request; leaving the context ends what still runs of it.

        Raises:
          APIError: the request is refused.
        """
        ...

    def token_text(self, token: int) -> str:
        """The text of one token."""
        ...

    async def load(self, name: str, registered: Registered) -> None:
        """Load an adapter.

        Raises:
          UserError, OSError: it cannot be loaded; what was loaded before stays loaded.
        """
        ...

    async def unload(self, name: str) -> bool:
        """Unload an adapter; False if none of that name is loaded."""
        ...

    async def health(self) -> tuple[bool, int]:
        """Whether requests can be served, and the number of free batch slots."""
        ...

    async def metrics_text(self) -> bytes:
        """All counters in the format of Prometheus."""
        ...


class Service:
    """A server without its HTTP.

    Args:
      base_name: name of the base alone as a model; empty if it is not served.
      tokenizers: two of the same, one for each of two threads: a tokenizer is not thread-safe.
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
        self.admission = AdmissionControl(limits)
        self._encoder, self._decoder = tokenizers
        self._token_texts: dict[int, str] = {}  # at most the vocabulary
        longest = max(map(len, self._encoder.get_vocab()), default=1)
        self._max_characters = longest * engine.cache_length
        self._grammars = Grammars(self._encoder, engine.config.vocab_size, engine.config.eos_ids, limits)
        self._calls = ToolCalls(self._encoder)
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encode")

    def models(self, tenant: Tenant) -> list[str]:
        """Names of the models that a tenant may use."""
        names = self.store.names() if self.store is not None else []
        mine = [name for name in names if tenant.may_use(name)]
        return [*([self.base_name] if self._serves_base(tenant) else []), *mine]

    @asynccontextmanager
    async def generate(self, tenant: Tenant, body: GenerationBody) -> AsyncIterator[Generation]:
        """Queue an admitted request; leaving the context ends what still runs of it.

        Raises:
          APIError: the request is refused.
        """
        with self._adapter(tenant, body.model) as adapter:
            self._require_short(body)
            prompt_format = PromptFormat() if adapter is None else adapter.prompt_format
            prompt = await asyncio.get_running_loop().run_in_executor(
                self._encoding, self._encode, body, prompt_format
            )
            ids = prompt.ids
            default = COMPLETION_TOKENS if isinstance(body, CompletionRequest) else 0
            settings = body.settings(self.limits, len(ids), self.engine.cache_length, default)
            try:
                self.engine.check(ids, settings)
            except UserError as error:
                raise bad_request(f"{error}.") from None
            constraint = await self._constraint(body)
            kind = "chatcmpl" if isinstance(body, ChatRequest) else "cmpl"
            with ExitStack() as queued:
                queued.enter_context(self.admission.queue_prompt(tenant, len(ids)))
                self.admission.spend_tokens(tenant, len(ids) + settings.max_new_tokens * settings.num_samples)
                deltas = self._deltas(tenant, adapter, prompt, body, settings, constraint, queued.close)
                async with aclosing(deltas):
                    yield Generation(f"{kind}-{secrets.token_hex(16)}", body.model, len(ids), deltas)

    def token_text(self, token: int) -> str:
        """The text of one token."""
        text = self._token_texts.get(token)
        if text is None:
            text = self._token_texts[token] = self._decoder.decode([token])
        return text

    async def load(self, name: str, registered: Registered) -> None:
        """Read an adapter, check it, and load it: see ``AdapterStore.load``."""
        if self.store is None:
            raise UserError("a server that was started without adapters has no slot for one")
        await asyncio.to_thread(self.store.load, name, registered.path, registered.pinned)

    async def unload(self, name: str) -> bool:
        """Unload an adapter; False if none of that name is loaded."""
        return self.store is not None and self.store.unload(name)

    async def health(self) -> tuple[bool, int]:
        """Whether the device loop runs, and the number of free batch slots."""
        return self.loop.alive, self.loop.counts.free_slots

    async def metrics_text(self) -> bytes:
        """All counters in the format of Prometheus."""
        return self.metrics.text()

    def close(self) -> None:
        """Admit no more requests."""
        self.admission.closed = True

    def _serves_base(self, tenant: Tenant) -> bool:
        return bool(self.base_name) and (tenant.adapters is None or self.base_name in tenant.adapters)

    @contextmanager
    def _adapter(self, tenant: Tenant, name: str) -> Iterator[AdapterVersion | None]:
        """The adapter of a model, held until its job holds it too; None for the base alone."""
        if name == self.base_name and self._serves_base(tenant):
            yield None
            return
        adapter = self.store.acquire(name) if self.store is not None and tenant.may_use(name) else None
        if adapter is None or self.store is None:
            raise model_not_found(name)
        try:
            yield adapter
        finally:
            self.store.release(adapter)
            self.loop.wake()

    def _require_short(self, body: GenerationBody) -> None:
        """Refuse a text that cannot fit into the context, whatever its tokens are, before it is tokenized."""
        chat = isinstance(body, ChatRequest)
        if isinstance(body, ChatRequest):
            characters = sum(message.characters for message in body.messages)
        else:
            characters = len(body.prompt) if isinstance(body.prompt, str) else 0
        if characters > self._max_characters:
            raise bad_request(
                f"This model has a context of {self.engine.cache_length} tokens (--context): "
                "the prompt is far longer.",
                "messages" if chat else "prompt",
                "context_length_exceeded",
            )

    def _encode(self, body: GenerationBody, prompt_format: PromptFormat) -> EncodedPrompt:
        """Token ids of a prompt, as the adapter was trained on them, and which of them its routers read.

        As in vLLM, special tokens are parsed in the prompt of a completion, which its client has written out,
        and never in the contents of a chat, which a user may have typed.
        """
        try:
            if isinstance(body, ChatRequest):
                messages, tools = body.chat(self.limits), body.tools_for_template(self.limits)
                self._calls.require_template(body, messages)
                return encode_messages(self._encoder, messages, prompt_format, tools)
            return prompt_ids(self._encoder, body.prompt, prompt_format, parse_special_tokens=True)
        except RouteScopeError as error:
            field = "messages" if isinstance(body, ChatRequest) else "prompt"
            raise bad_request(f"The adapter of model {body.model!r}: {error}.", field) from None
        except UserError as error:
            raise bad_request(f"{error}.") from None

    async def _constraint(self, body: GenerationBody) -> GrammarConstraint | None:
        """The constraint of a request that wants a format; None for another one."""
        calls = self._calls.grammar_of(body) if isinstance(body, ChatRequest) else None
        if calls is None and not body.wants_format:
            return None
        if calls is not None and body.wants_format:
            raise bad_request("tool_choice: a reply that has to call has no other format.", "tool_choice")
        if body.ignore_eos:
            raise bad_request("ignore_eos: an answer in a format ends where the format does.", "ignore_eos")
        return await self._grammars.constraint(calls or body.format_grammar)

    async def _deltas(
        self,
        tenant: Tenant,
        adapter: AdapterVersion | None,
        prompt: EncodedPrompt,
        body: GenerationBody,
        settings: GenerationSettings,
        constraint: GrammarConstraint | None,
        on_start: Callable[[], None],
    ) -> AsyncGenerator[Delta]:
        """Submit a job, and turn its stream events into text until every sample has ended.

        Args:
          on_start: called when the prompt is no longer queued.
        """
        event_loop = asyncio.get_running_loop()
        events: asyncio.Queue[StreamEvent] = asyncio.Queue()
        job = Job(
            tenant.name,
            adapter,
            tuple(prompt.ids),
            settings,
            lambda event: event_loop.call_soon_threadsafe(events.put_nowait, event),
            # The route of the base's slot of zeros changes nothing, whatever its routers read.
            route_tokens=prompt.route_tokens if adapter is not None else 1,
            cache_scope=self._cache_scope(tenant, adapter, body.cache_salt or ""),
            constraint=constraint,
        )
        samples = range(settings.num_samples)
        tools = body if isinstance(body, ChatRequest) else None
        hidden = tools and self._calls.hidden_tokens(tools)
        texts = [TextStream(self._decoder, settings.stop, hidden) for _ in samples]
        parsers = [tools and self._calls.parser_of(tools) for _ in samples]
        open_samples, new_tokens = set(samples), 0
        submitted, last = time.monotonic(), 0.0
        try:
            self.loop.submit(job)
        except RuntimeError:
            raise overloaded("The server is stopping.") from None
        try:
            event = await events.get()
            on_start()
            self.metrics.first_token.observe(time.monotonic() - submitted)
            while True:
                if event.finish == "constraint":
                    raise invalid_grammar(constraint.field if constraint else "", event.failure)
                if event.finish in ("error", "cancelled"):
                    raise internal_error()
                now = time.monotonic()
                if last and event.tokens:
                    self.metrics.between_tokens.observe((now - last) / len(event.tokens))
                last = now
                if event.route is not None:
                    self._count_experts(event.route)
                if event.sample in open_samples:
                    delta = self._delta(job, texts[event.sample], event)
                    if (parser := parsers[event.sample]) is not None:
                        delta = with_calls(delta, parser)
                    new_tokens += len(delta.tokens)
                    if delta.finish is not None:
                        open_samples.discard(event.sample)
                    yield delta
                if not open_samples:
                    return
                event = await events.get()
        finally:
            for sample in open_samples:
                self.loop.end(job, sample, "cancelled")
            self.metrics.tokens.labels(tenant.name, "prompt").inc(len(prompt))
            self.metrics.tokens.labels(tenant.name, "completion").inc(new_tokens)

    def _cache_scope(self, tenant: Tenant, adapter: AdapterVersion | None, salt: str) -> str:
        """Who may find the keys and values of a prompt, and under which adapter."""
        who = "" if self.limits.share_prefixes else tenant.name
        return json.dumps([who, None if adapter is None else adapter.version, salt])

    def _count_experts(self, route: np.ndarray) -> None:
        for layer, weights in enumerate(route):
            for expert, weight in zip(EXPERTS, weights, strict=True):
                self.metrics.experts.labels(str(layer), expert).inc(float(weight))

    def _delta(self, job: Job, text: TextStream, event: StreamEvent) -> Delta:
        """The text of an event's tokens; a stop string ends the sample, here and in the device loop."""
        finish: Any = event.finish
        shown = event.tokens[:-1] if finish == "stop" else event.tokens
        before = len(text.tokens)
        fresh = text.add(shown, last=finish is not None)
        if not text.stopped:
            return Delta(
                event.sample, fresh, event.tokens, event.logprobs, finish, event.route, event.cached_tokens
            )
        if finish is None:
            self.loop.end(job, event.sample, "stop")
        kept = len(text.tokens) - before
        tokens, logprobs = event.tokens[:kept], event.logprobs[:kept]
        return Delta(event.sample, fresh, tokens, logprobs, "stop", event.route, event.cached_tokens)


def with_calls(delta: Delta, parser: CallParser) -> Delta:
    """A delta whose text has gone through the parser of its sample."""
    text, calls = parser.feed(delta.text, delta.finish is not None)
    finish = "tool_calls" if delta.finish == "stop" and parser.count else delta.finish
    return replace(delta, text=text, calls=tuple(calls), finish=finish)
