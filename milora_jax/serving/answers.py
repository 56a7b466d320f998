"""Writers of the responses of the calls that generate, as a whole or as the events of a stream."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from pydantic import BaseModel
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from milora_jax.generation.request import TokenLogprobs
from milora_jax.serving import responses
from milora_jax.serving.api_errors import APIError
from milora_jax.serving.backend import Backend, Delta, Generation
from milora_jax.serving.keys import Tenant
from milora_jax.serving.requests import ChatRequest, CompletionRequest
from milora_jax.serving.responses import ErrorResponse, PromptTokens, RouteInfo, Usage, as_json
from milora_jax.types import EXPERTS

LOWEST_LOGPROB = -9999.0
"""The value that stands for minus infinity, which JSON does not have."""


class ResponseWriter(Protocol):
    """Writes the response to one request."""

    async def whole(self) -> bytes:
        """Return the JSON of the whole response."""
        ...

    def events(self, first: Delta) -> AsyncIterator[bytes]:
        """Yield the server-sent events of a stream whose first delta has been taken."""
        ...


class Writer(ABC):
    """Writes the response to one request."""

    def __init__(self, body: Any, generation: Generation, service: Backend) -> None:
        self._body, self._generation, self._service = body, generation, service
        self._token_text = service.token_text
        self._samples = range(len(generation.prompts) * body.samples)
        self._new_tokens = 0
        self._cached_tokens: dict[int, int] = {}  # by prompt
        self._calls = [0] * len(self._samples)

    async def whole(self) -> bytes:
        """Return the JSON of the response of all deltas."""
        deltas = [delta async for delta in self._generation.deltas]
        for delta in deltas:
            self._count(delta)
        route = next((delta.route for delta in deltas if delta.route is not None), None)
        parts: list[list[Delta]] = [[] for _ in self._samples]
        for delta in deltas:
            parts[delta.sample].append(delta)
        samples = [joined(each) for each in parts]
        return as_json(self._response(samples, {**self._fields(route), "usage": self._usage()}))

    async def events(self, first: Delta) -> AsyncIterator[bytes]:
        """Yield the server-sent events of a stream; an error after the first one is an event too.

        Args:
          first: the first delta, which has been taken from the generation.

        Raises:
          APIError: after its event.
        """
        no_usage = {"usage": None} if self._body.include_usage else {}
        try:
            for response in self._opening({**self._fields(None), **no_usage}):
                yield server_event(as_json(response))
            for event in self._delta_events(first, no_usage):
                yield event
            async for delta in self._generation.deltas:
                shows = self._shows(delta)
                events = self._delta_events(delta, no_usage)  # they count its tokens, even if it has no text
                for event in events if shows else ():
                    yield event
            if self._body.include_usage:
                yield server_event(as_json(self._chunk([], {**self._fields(None), "usage": self._usage()})))
            yield server_event(b"[DONE]")
        except APIError as error:
            yield server_event(as_json(ErrorResponse(**error.body)))
            raise

    def _count(self, delta: Delta) -> None:
        self._new_tokens += len(delta.tokens)
        self._cached_tokens[delta.sample // self._body.samples] = delta.cached_tokens

    def _delta_events(self, delta: Delta, no_usage: dict[str, None]) -> list[bytes]:
        self._count(delta)
        fields = {**self._fields(delta.route), **no_usage}
        chunks = [*self._call_chunks(delta, fields), self._chunk([delta], fields)]
        return [server_event(as_json(chunk)) for chunk in chunks]

    def _call_chunks(self, delta: Delta, fields: dict[str, Any]) -> Iterator[BaseModel]:
        """The events of the calls of a delta, which come before its own."""
        yield from ()

    def _shows(self, delta: Delta) -> bool:
        """Whether a client can see anything of a delta."""
        return bool(delta.text or delta.finish or delta.logprobs or delta.calls)

    def _fields(self, route: np.ndarray | None) -> dict[str, Any]:
        generation = self._generation
        fields = {"id": generation.id, "created": generation.created, "model": generation.model}
        if route is not None and self._body.return_route:
            weights = route.astype(float).round(6).tolist()
            fields["milora"] = RouteInfo(experts=list(EXPERTS), route=weights)
        return fields

    def _usage(self) -> Usage:
        prompt, new = self._generation.prompt_tokens, self._new_tokens
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=new,
            total_tokens=prompt + new,
            prompt_tokens_details=PromptTokens(cached_tokens=sum(self._cached_tokens.values())),
        )

    def _choice(self, delta: Delta) -> dict[str, Any]:
        """The fields that all choices have."""
        return {"index": delta.sample, "logprobs": self._logprobs(delta), "finish_reason": delta.finish}

    @abstractmethod
    def _response(self, samples: Sequence[Delta], fields: dict[str, Any]) -> BaseModel:
        """The whole response."""

    def _opening(self, fields: dict[str, Any]) -> Iterator[BaseModel]:
        """The events before the first delta."""
        yield from ()

    @abstractmethod
    def _chunk(self, deltas: Sequence[Delta], fields: dict[str, Any]) -> BaseModel:
        """The event of one delta, or of none."""

    @abstractmethod
    def _logprobs(self, delta: Delta) -> BaseModel | None:
        """The log-probabilities of a delta, if they are wanted."""


class CompletionWriter(Writer):
    """Writes responses of ``/v1/completions``, whose stream events have the form of the whole response."""

    _body: CompletionRequest

    def __init__(self, body: Any, generation: Generation, service: Backend) -> None:
        super().__init__(body, generation, service)
        self._offsets: dict[int, int] = {}  # characters of the tokens of each sample that has been begun

    def _response(self, samples: Sequence[Delta], fields: dict[str, Any]) -> BaseModel:
        choices = []
        for each in samples:
            text = self._echo(each) + each.text  # before its log-probabilities, which begin the sample
            choices.append(responses.CompletionChoice(text=text, **self._choice(each)))
            self._offsets.setdefault(each.sample, 0)
        return responses.CompletionResponse(object="text_completion", choices=choices, **fields)

    def _chunk(self, deltas: Sequence[Delta], fields: dict[str, Any]) -> BaseModel:
        return self._response(deltas, fields)

    def _logprobs(self, delta: Delta) -> responses.CompletionLogprobs | None:
        most = self._body.logprobs
        if most is None:
            return None
        tokens, values = delta.tokens, [*delta.logprobs]
        if self._echoes(delta):
            tokens = (*self._prompt(delta), *tokens)
            values = [None, *delta.prompt_logprobs, *values]
        texts = [self._token_text(token) for token in tokens]
        *offsets, end = itertools.accumulate(map(len, texts), initial=self._offsets.get(delta.sample, 0))
        self._offsets[delta.sample] = end
        return responses.CompletionLogprobs(
            tokens=texts,
            token_logprobs=[each and _finite(each.logprob) for each in values],
            top_logprobs=[
                each and self._top(text, each, most) for text, each in zip(texts, values, strict=True)
            ],
            text_offset=offsets,
        )

    def _top(self, text: str, found: TokenLogprobs, most: int) -> dict[str, float]:
        """The most probable tokens, and the token itself, which may be one more; of equal texts the first."""
        top: dict[str, float] = {}
        for token, value in found.top[:most]:
            top.setdefault(self._token_text(token), _finite(value))
        top.setdefault(text, _finite(found.logprob))
        return top

    def _prompt(self, delta: Delta) -> tuple[int, ...]:
        return self._generation.prompts[delta.sample // self._body.samples]

    def _echoes(self, delta: Delta) -> bool:
        """Whether a delta comes with the prompt."""
        return bool(self._body.echo) and delta.sample not in self._offsets

    def _echo(self, delta: Delta) -> str:
        """The text of the prompt, if the delta comes with it."""
        if not self._echoes(delta):
            return ""
        given = self._body.texts[delta.sample // self._body.samples]
        return given if isinstance(given, str) else self._service.text_of(given)

    def _shows(self, delta: Delta) -> bool:
        return super()._shows(delta) or self._echoes(delta)


class ChatWriter(Writer):
    """Writes responses of ``/v1/chat/completions``."""

    _body: ChatRequest

    def _response(self, samples: Sequence[Delta], fields: dict[str, Any]) -> BaseModel:
        choices = [
            responses.ChatChoice(message=_assistant_message(each), **self._choice(each)) for each in samples
        ]
        return responses.ChatResponse(object="chat.completion", choices=choices, **fields)

    def _opening(self, fields: dict[str, Any]) -> Iterator[BaseModel]:
        delta = responses.ChatDelta(role="assistant", content="")
        for i in self._samples:
            choice = responses.ChatChunkChoice(index=i, delta=delta, logprobs=None, finish_reason=None)
            yield responses.ChatChunk(object="chat.completion.chunk", choices=[choice], **fields)

    def _chunk(self, deltas: Sequence[Delta], fields: dict[str, Any]) -> BaseModel:
        choices = []
        for each in deltas:
            has_content = each.text or not each.finish
            delta = responses.ChatDelta(content=each.text) if has_content else responses.ChatDelta()
            choices.append(responses.ChatChunkChoice(delta=delta, **self._choice(each)))
        return responses.ChatChunk(object="chat.completion.chunk", choices=choices, **fields)

    def _call_chunks(self, delta: Delta, fields: dict[str, Any]) -> Iterator[BaseModel]:
        for index, call in enumerate(delta.calls, self._calls[delta.sample]):
            name = responses.FunctionDelta(name=call.name, arguments="")
            more = responses.FunctionDelta(arguments=call.arguments)
            for each in (
                responses.ToolCallDelta(index=index, id=call.id, type="function", function=name),
                responses.ToolCallDelta(index=index, function=more),
            ):
                choice = responses.ChatChunkChoice(
                    index=delta.sample,
                    delta=responses.ChatDelta(tool_calls=[each]),
                    logprobs=None,
                    finish_reason=None,
                )
                yield responses.ChatChunk(object="chat.completion.chunk", choices=[choice], **fields)
        self._calls[delta.sample] += len(delta.calls)

    def _logprobs(self, delta: Delta) -> responses.ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        most = self._body.top_logprobs or 0
        content = []
        for token, each in zip(delta.tokens, delta.logprobs, strict=True):
            top = [responses.TopLogprob(**self._token(*pair)) for pair in each.top[:most]]
            content.append(responses.TokenLogprob(**self._token(token, each.logprob), top_logprobs=top))
        return responses.ChatLogprobs(content=content)

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


def _assistant_message(sample: Delta) -> responses.AssistantMessage:
    if not sample.calls:
        return responses.AssistantMessage(role="assistant", content=sample.text)
    calls = [
        responses.ToolCall(
            id=call.id,
            type="function",
            function=responses.CalledFunction(name=call.name, arguments=call.arguments),
        )
        for call in sample.calls
    ]
    return responses.AssistantMessage(role="assistant", content=sample.text or None, tool_calls=calls)


def joined(deltas: Sequence[Delta]) -> Delta:
    """Join all deltas of one sample into one."""
    return Delta(
        deltas[0].sample,
        "".join(each.text for each in deltas),
        tuple(itertools.chain.from_iterable(each.tokens for each in deltas)),
        tuple(itertools.chain.from_iterable(each.logprobs for each in deltas)),
        deltas[-1].finish,
        cached_tokens=deltas[0].cached_tokens,
        calls=tuple(itertools.chain.from_iterable(each.calls for each in deltas)),
        prompt_logprobs=deltas[0].prompt_logprobs,
    )


class GenerationResponse(Response):
    """A response that generates while it is sent, so that the generation ends when the sending ends.

    Args:
      body: body of the request to generate.
      writer: makes the writer of the response of a generation.
      names: names of fields in the request, by those of the body, for errors.
    """

    def __init__(
        self,
        service: Backend,
        tenant: Tenant,
        body: CompletionRequest | ChatRequest,
        writer: Callable[[Generation], ResponseWriter],
        names: Mapping[str, str] | None = None,
    ) -> None:
        self._service, self._tenant, self._body, self._writer = service, tenant, body, writer
        self._names = names or {}
        self.background = None  # which FastAPI looks at

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the whole response, or a stream whose status is known once the first tokens are there."""
        try:
            await self._answer(scope, receive, send)
        except APIError as error:
            detail = error.body["error"]
            detail["param"] = self._names.get(detail["param"], detail["param"])
            raise

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = self._body
        async with self._service.generate(self._tenant, body) as generation:
            writer = self._writer(generation)
            if body.stream:
                events = writer.events(await anext(generation.deltas))
                headers = {"cache-control": "no-store"}
                response = StreamingResponse(events, headers=headers, media_type="text/event-stream")
            else:
                response = Response(await writer.whole(), media_type="application/json")
            await response(scope, receive, send)


def server_event(data: bytes, name: str = "") -> bytes:
    """Return a server-sent event, with a name or without."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + data + b"\n\n"


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
