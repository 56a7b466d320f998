"""Turns a validated request into the text of its samples, in the thread of the event loop."""

from __future__ import annotations

import asyncio
import functools
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from milora_jax.data.scopes import EncodedPrompt, RouteScopeError, encode_messages
from milora_jax.errors import UserError
from milora_jax.generation.engine import Engine
from milora_jax.generation.settings import GenerationSettings
from milora_jax.generation.stream import TextStream
from milora_jax.generation.text import prompt_ids
from milora_jax.prompt_format import PromptFormat
from milora_jax.serving.admission import AdmissionControl
from milora_jax.serving.api_errors import bad_request, internal_error, model_not_found, overloaded
from milora_jax.serving.backend import Delta, Generation, GenerationBody
from milora_jax.serving.jobs import Job, StreamEvent
from milora_jax.serving.keys import Tenant
from milora_jax.serving.limits import Limits
from milora_jax.serving.loop import DeviceLoop
from milora_jax.serving.metrics import Metrics
from milora_jax.serving.registry import Registered
from milora_jax.serving.requests import ChatRequest, CompletionRequest
from milora_jax.serving.store import AdapterStore, AdapterVersion
from milora_jax.serving.structured import GrammarConstraint, Grammars, invalid_grammar
from milora_jax.serving.tokenization import DetokenizeRequest, Tokenized, TokenizeRequest, tokenized
from milora_jax.serving.tools import CallParser, ToolCalls
from milora_jax.types import EXPERTS

COMPLETION_TOKENS = 16
"""Default ``max_tokens`` of a completion, as in OpenAI's API; a chat may fill the context."""


class Service:
    """A server without the HTTP layer.

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
        """Return the names of the models that a tenant may use."""
        names = self.store.names() if self.store is not None else []
        mine = [name for name in names if tenant.may_use(name)]
        return [*([self.base_name] if self._serves_base(tenant) else []), *mine]

    @asynccontextmanager
    async def generate(self, tenant: Tenant, body: GenerationBody) -> AsyncIterator[Generation]:
        """Queue an admitted request; leaving the context ends its samples that still run.

        Raises:
          APIError: the request is refused.
        """
        with self._adapter(tenant, body.model) as adapter:
            self._require_short(body)
            prompt_format = PromptFormat() if adapter is None else adapter.prompt_format
            prompts = [
                await self._in_encoder(self._encode, body, prompt, prompt_format)  # others may come between
                for prompt in body.prompts(self.limits)
            ]
            settings = [self._settings(body, prompt.ids) for prompt in prompts]
            constraint = await self._constraint(body)
            kind = "chatcmpl" if isinstance(body, ChatRequest) else "cmpl"
            with ExitStack() as queued:
                length = sum(map(len, prompts))
                new = sum(each.max_new_tokens * each.num_samples for each in settings)
                queued.enter_context(self.admission.queue_prompt(tenant, length))
                self.admission.spend_tokens(tenant, length + new)
                scope = self._cache_scope(tenant, adapter, body)

                def job(number: int, send: Callable[[StreamEvent], object]) -> Job:
                    prompt = prompts[number]
                    return Job(
                        tenant.name,
                        adapter,
                        tuple(prompt.ids),
                        settings[number],
                        send,
                        # The route of the base's slot of zeros changes nothing, whatever its routers read.
                        route_tokens=prompt.route_tokens if adapter is not None else 1,
                        cache_scope=scope,
                        constraint=constraint,
                    )

                async with aclosing(self._deltas(job, len(prompts), body, queued.close)) as deltas:
                    ids = tuple(tuple(prompt.ids) for prompt in prompts)
                    yield Generation(f"{kind}-{secrets.token_hex(16)}", body.model, ids, deltas)

    def token_text(self, token: int) -> str:
        """Return the text of one token."""
        text = self._token_texts.get(token)
        if text is None:
            text = self._token_texts[token] = self._decoder.decode([token])
        return text

    def text_of(self, tokens: Sequence[int]) -> str:
        """Return the text of several tokens, including special ones."""
        return self._decoder.decode(list(tokens))

    async def tokenize(self, tenant: Tenant, body: TokenizeRequest) -> Tokenized:
        """Return the token ids of a prompt, as a generation would get it."""
        with self._adapter(tenant, self._named(tenant, body.model)) as adapter:
            self._require_short(body)
            prompt_format = PromptFormat() if adapter is None else adapter.prompt_format
            limits, context = self.limits, self.engine.cache_length
            found = await self._in_encoder(tokenized, self._encoder, body, prompt_format, limits, context)
        self.admission.spend_tokens(tenant, len(found.tokens))
        return found

    async def detokenize(self, tenant: Tenant, body: DetokenizeRequest) -> str:
        """Return the text of token ids."""
        with self._adapter(tenant, self._named(tenant, body.model)):
            body.require_served(self.engine.config.vocab_size, self.engine.cache_length)
            self.admission.spend_tokens(tenant, len(body.tokens))
            return await self._in_encoder(self._encoder.decode, body.tokens)

    async def load(self, name: str, registered: Registered) -> None:
        """Read an adapter, check it, and load it: see ``AdapterStore.load``."""
        if self.store is None:
            raise UserError("a server that was started without adapters has no slot for one")
        await asyncio.to_thread(self.store.load, name, registered.path, registered.pinned)

    async def unload(self, name: str) -> bool:
        """Unload an adapter; return False if no adapter of that name is loaded."""
        return self.store is not None and self.store.unload(name)

    async def health(self) -> tuple[bool, int]:
        """Return whether the device loop runs, and the number of free batch slots."""
        return self.loop.alive, self.loop.counts.free_slots

    async def metrics_text(self) -> bytes:
        """Return all counters in the format of Prometheus."""
        return self.metrics.text()

    def close(self) -> None:
        """Admit no more requests."""
        self.admission.closed = True

    def _serves_base(self, tenant: Tenant) -> bool:
        return bool(self.base_name) and (tenant.adapters is None or self.base_name in tenant.adapters)

    def _named(self, tenant: Tenant, name: str | None) -> str:
        """A name of a model, or that of the first which a tenant may use."""
        return next(iter(self.models(tenant)), "") if name is None else name

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

    def _require_short(self, body: GenerationBody | TokenizeRequest) -> None:
        """Refuse a text that cannot fit into the context, whatever its tokens are, before it is tokenized."""
        if isinstance(body, CompletionRequest) or body.messages is None:
            field, texts = "prompt", [len(text) for text in body.texts if isinstance(text, str)]
        else:
            field, texts = "messages", [sum(message.characters for message in body.messages)]
        if max(texts, default=0) > self._max_characters:
            raise bad_request(
                f"This model has a context of {self.engine.cache_length} tokens (--context): "
                "the prompt is far longer.",
                field,
                "context_length_exceeded",
            )

    async def _in_encoder(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function returns in the thread of the encoder."""
        return await asyncio.get_running_loop().run_in_executor(self._encoding, function, *arguments)

    def _settings(self, body: GenerationBody, ids: Sequence[int]) -> GenerationSettings:
        """The settings for one of the prompts of a request, which can be served."""
        default = COMPLETION_TOKENS if isinstance(body, CompletionRequest) else 0
        settings = body.settings(self.limits, len(ids), self.engine.cache_length, default)
        try:
            self.engine.check(ids, settings)
        except UserError as error:
            field = str(error).split(" ", 1)[0]
            raise bad_request(f"{error}.", field if field in type(body).model_fields else None) from None
        return settings

    def _encode(
        self, body: GenerationBody, prompt: ChatRequest | str | list[int], prompt_format: PromptFormat
    ) -> EncodedPrompt:
        """Token ids of a prompt, as the adapter was trained on them, and which of them its routers read.

        As in vLLM, special tokens are parsed in the prompt of a completion, which its client has written out,
        and never in the contents of a chat, which a user may have typed.
        """
        try:
            if isinstance(prompt, ChatRequest):
                messages, tools = prompt.chat(self.limits), prompt.tools_for_template(self.limits)
                self._calls.require_template(prompt, messages)
                return encode_messages(self._encoder, messages, prompt_format, tools)
            return prompt_ids(self._encoder, prompt, prompt_format, parse_special_tokens=True)
        except RouteScopeError as error:
            field = "messages" if isinstance(prompt, ChatRequest) else "prompt"
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

    def _cache_scope(self, tenant: Tenant, adapter: AdapterVersion | None, body: GenerationBody) -> str:
        """Who may find the keys and values of a prompt, and under which adapter."""
        who = "" if self.limits.share_prefixes else tenant.name
        return json.dumps([who, None if adapter is None else adapter.version, body.cache_salt or ""])

    async def _deltas(
        self,
        make_job: Callable[[int, Callable[[StreamEvent], object]], Job],
        prompts: int,
        body: GenerationBody,
        on_start: Callable[[], None],
    ) -> AsyncGenerator[Delta]:
        """Submit a job for each prompt, and turn their stream events into text until all have ended.

        Args:
          make_job: makes the job of a prompt, by its number, given where its stream events go.
          on_start: called when no prompt is queued any more.
        """
        event_loop = asyncio.get_running_loop()
        events: asyncio.Queue[tuple[int, StreamEvent]] = asyncio.Queue()

        def send(number: int, event: StreamEvent) -> None:
            event_loop.call_soon_threadsafe(events.put_nowait, (number, event))

        jobs = [make_job(number, functools.partial(send, number)) for number in range(prompts)]
        count, constraint = jobs[0].settings.num_samples, jobs[0].constraint
        tools = body if isinstance(body, ChatRequest) else None
        hidden = tools and self._calls.hidden_tokens(tools)
        texts = [TextStream(self._decoder, job.settings.stop, hidden) for job in jobs for _ in range(count)]
        parsers = [tools and self._calls.parser_of(tools) for _ in texts]
        open_samples: set[int] = set()
        begin, new_tokens, last = time.monotonic(), 0, [0.0] * len(jobs)
        try:
            for number, job in enumerate(jobs):
                self._submit(job)
                open_samples |= set(range(number * count, (number + 1) * count))
            while open_samples:
                number, event = await events.get()
                now = time.monotonic()
                if not last[number]:
                    self.metrics.first_token.observe(now - begin)
                elif event.tokens:
                    self.metrics.between_tokens.observe((now - last[number]) / len(event.tokens))
                last[number] = now
                if all(last):
                    on_start()
                if event.finish == "constraint":
                    field = constraint.field if isinstance(constraint, GrammarConstraint) else ""
                    raise invalid_grammar(field, event.failure)
                if event.finish in ("error", "cancelled"):
                    raise internal_error()
                if event.route is not None:
                    self._count_experts(event.route)
                sample = number * count + event.sample
                if sample in open_samples:
                    delta = self._delta(jobs[number], texts[sample], event, sample)
                    if (parser := parsers[sample]) is not None:
                        delta = with_calls(delta, parser)
                    new_tokens += len(delta.tokens)
                    if delta.finish is not None:
                        open_samples.discard(sample)
                    yield delta
        finally:
            for sample in open_samples:
                self.loop.end(jobs[sample // count], sample % count, "cancelled")
            tokens = self.metrics.tokens
            tokens.labels(jobs[0].tenant, "prompt").inc(sum(len(job.prompt) for job in jobs))
            tokens.labels(jobs[0].tenant, "completion").inc(new_tokens)

    def _submit(self, job: Job) -> None:
        try:
            self.loop.submit(job)
        except RuntimeError:
            raise overloaded("The server is stopping.") from None

    def _count_experts(self, route: np.ndarray) -> None:
        for layer, weights in enumerate(route):
            for expert, weight in zip(EXPERTS, weights, strict=True):
                self.metrics.experts.labels(str(layer), expert).inc(float(weight))

    def _delta(self, job: Job, text: TextStream, event: StreamEvent, sample: int) -> Delta:
        """The text of an event's tokens; a stop string ends the sample, here and in the device loop."""
        finish: Any = event.finish
        shown = event.tokens[:-1] if finish == "stop" else event.tokens
        before = len(text.tokens)
        fresh = text.add(shown, last=finish is not None)
        tokens, logprobs = event.tokens, event.logprobs
        if text.stopped:
            if finish is None:
                self.loop.end(job, event.sample, "stop")
            kept = len(text.tokens) - before
            tokens, logprobs, finish = tokens[:kept], logprobs[:kept], "stop"
        return Delta(
            sample,
            fresh,
            tokens,
            logprobs,
            finish,
            route=event.route,
            cached_tokens=event.cached_tokens,
            prompt_logprobs=event.prompt_logprobs,
        )


def with_calls(delta: Delta, parser: CallParser) -> Delta:
    """Return a delta whose text has gone through the parser of its sample."""
    text, calls = parser.feed(delta.text, delta.finish is not None)
    finish = "tool_calls" if delta.finish == "stop" and parser.count else delta.finish
    return replace(delta, text=text, calls=tuple(calls), finish=finish)
