"""``/v1/responses`` without state: a request becomes a chat, and its answer an output of one message.

Nothing is stored, so that ``previous_response_id`` is refused and ``store`` is false in every response.
"""

from __future__ import annotations

import itertools
import json
import secrets
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import pydantic_core
from pydantic import BaseModel, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from milora_jax.serving.answers import joined, server_event
from milora_jax.serving.api_errors import APIError
from milora_jax.serving.backend import Delta, Generation
from milora_jax.serving.format_fields import JSONSchema, ResponseFormat, Schema
from milora_jax.serving.request_base import BOUNDED, FAIL_FAST, Ignored, Number, RequestBase
from milora_jax.serving.requests import ChatMessage, ChatRequest, Metadata, require_parts
from milora_jax.serving.unsupported import (
    RESPONSES,
    RESPONSES_ITEM,
    RESPONSES_PART,
    RESPONSES_TEXT,
    UNSUPPORTED,
)

NAMES = {
    "messages": "input",
    "prompt": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text",
}
"""The fields of a response, by the names of the chat's fields that they become."""

PARTS = ("input_text", "output_text", "text")


class InputPart(RequestBase):
    """A part of a message."""

    unsupported = RESPONSES_PART

    type: Literal["input_text", "output_text", "text"]
    text: str


class InputMessage(RequestBase):
    """A message of an input, or of an earlier output."""

    unsupported = RESPONSES_ITEM

    type: Literal["message"] | None = None
    id: Ignored = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[InputPart], Field(min_length=1), BOUNDED, FAIL_FAST]

    @field_validator("content", mode="before")
    @classmethod
    def _refuse_other_parts(cls, content: Any) -> Any:
        require_parts(content, PARTS)
        return content


class TextFormat(RequestBase):
    """The format of the text; a schema comes with its name and ``strict``."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _require_schema(self) -> TextFormat:
        given = [self.name, self.description, self.schema_, self.strict]
        if self.type != "json_schema" and any(value is not None for value in given):
            raise PydanticCustomError("format", "a schema goes with the type json_schema")
        if self.type == "json_schema" and (self.name is None or self.schema_ is None):
            raise PydanticCustomError("format", "the type json_schema needs a name and a schema")
        return self

    @property
    def written(self) -> dict[str, Any]:
        """The format as a response repeats it."""
        return self.model_dump(by_alias=True, exclude_none=True)

    @property
    def as_response_format(self) -> ResponseFormat:
        """The format as a field of chats."""
        if self.type != "json_schema":
            return ResponseFormat(type=self.type)
        schema = JSONSchema.model_validate({"name": self.name, "schema": self.schema_, "strict": self.strict})
        return ResponseFormat(type=self.type, json_schema=schema)


class TextOptions(RequestBase):
    """Options of the text."""

    unsupported = RESPONSES_TEXT

    format: TextFormat | None = None


class ResponsesRequest(RequestBase):
    """The body of ``/v1/responses``."""

    unsupported = RESPONSES

    model: str
    input: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[InputMessage], Field(min_length=1), BOUNDED, FAIL_FAST]
    )
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    text: TextOptions | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    user: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None

    @field_validator("input", mode="before")
    @classmethod
    def _refuse_other_items(cls, value: Any) -> Any:
        items = value if isinstance(value, list) else []
        kinds = (item.get("type") for item in items if isinstance(item, dict))
        wrong = next((kind for kind in kinds if isinstance(kind, str) and kind != "message"), None)
        if wrong is not None:
            message = "an item of type {kind} is not supported: expected message"
            raise PydanticCustomError(UNSUPPORTED, message, {"field": "type", "kind": json.dumps(wrong[:40])})
        return value

    def as_chat(self) -> ChatRequest:
        """Return the chat that is generated. Its ``response_format`` is what ``text.format`` asks for."""
        wanted = None if self.text is None else self.text.format
        messages = [] if self.instructions is None else [("system", self.instructions)]
        if isinstance(self.input, str):
            messages.append(("user", self.input))
        else:
            messages += [(each.role, _text_of(each)) for each in self.input]
        return ChatRequest(
            model=self.model,
            messages=[ChatMessage.model_validate({"role": role, "content": text}) for role, text in messages],
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stream=self.stream,
            response_format=wanted and wanted.as_response_format,
        )


def _text_of(message: InputMessage) -> str:
    content = message.content
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


class OutputText(BaseModel):
    """The text of an output."""

    type: Literal["output_text"] = "output_text"
    text: str = ""
    annotations: list[str] = []
    logprobs: list[str] = []


class OutputMessage(BaseModel):
    """The message of an output."""

    id: str
    type: Literal["message"] = "message"
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class IncompleteDetails(BaseModel):
    """The reason for which an output is not complete."""

    reason: Literal["max_output_tokens"]


class ResponseError(BaseModel):
    """The reason for which a response failed."""

    code: Literal["server_error"]
    message: str


class InputTokensDetails(BaseModel):
    """Numbers of tokens of the input by kind."""

    cached_tokens: int = 0


class OutputTokensDetails(BaseModel):
    """Numbers of tokens of the output by kind."""

    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    """Numbers of tokens of a response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails = InputTokensDetails()
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int


class ResponseObject(BaseModel):
    """The response of ``/v1/responses``. Unlike others it is written with all its fields."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool = True
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float
    text: dict[str, dict[str, Any]]
    tool_choice: str = "auto"
    tools: list[str] = []
    top_p: float
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None


class ResponsesWriter:
    """Writes the response to one request, see ``answers.ResponseWriter``."""

    def __init__(self, body: ResponsesRequest, generation: Generation) -> None:
        self._body, self._generation = body, generation
        self._item = f"msg_{secrets.token_hex(16)}"
        self._numbers = itertools.count()

    async def whole(self) -> bytes:
        """Return the JSON of the whole response."""
        ended = self._ended(joined([delta async for delta in self._generation.deltas]))
        return ended.model_dump_json().encode()

    async def events(self, first: Delta) -> AsyncIterator[bytes]:
        """Yield the events of a stream, in OpenAI's order; an error after the first one is an event too.

        Raises:
          APIError: after its event.
        """
        started = self._response("in_progress", [])
        place = {"item_id": self._item, "output_index": 0, "content_index": 0}
        yield self._event("response.created", response=started)
        yield self._event("response.in_progress", response=started)
        message = OutputMessage(id=self._item, status="in_progress", content=[])
        yield self._event("response.output_item.added", output_index=0, item=message)
        yield self._event("response.content_part.added", part=OutputText(), **place)
        deltas = [first]
        try:
            if first.text:
                yield self._event("response.output_text.delta", delta=first.text, logprobs=[], **place)
            async for delta in self._generation.deltas:
                deltas.append(delta)
                if delta.text:
                    yield self._event("response.output_text.delta", delta=delta.text, logprobs=[], **place)
        except APIError as error:
            why = ResponseError(code="server_error", message=str(error))
            yield self._event("response.failed", response=self._response("failed", [], error=why))
            raise
        ended = self._ended(joined(deltas))
        part = ended.output[0].content[0]
        yield self._event("response.output_text.done", text=part.text, logprobs=[], **place)
        yield self._event("response.content_part.done", part=part, **place)
        yield self._event("response.output_item.done", output_index=0, item=ended.output[0])
        yield self._event(f"response.{ended.status}", response=ended)

    def _event(self, kind: str, **fields: Any) -> bytes:
        content = {"type": kind, "sequence_number": next(self._numbers), **fields}
        return server_event(pydantic_core.to_json(content), kind)

    def _ended(self, sample: Delta) -> ResponseObject:
        """The response of all that was generated."""
        incomplete = sample.finish == "length"
        status = "incomplete" if incomplete else "completed"
        text = OutputText(text=sample.text)
        prompt, new = self._generation.prompt_tokens, len(sample.tokens)
        return self._response(
            status,
            [OutputMessage(id=self._item, status=status, content=[text])],
            incomplete_details=IncompleteDetails(reason="max_output_tokens") if incomplete else None,
            usage=ResponseUsage(
                input_tokens=prompt,
                input_tokens_details=InputTokensDetails(cached_tokens=sample.cached_tokens),
                output_tokens=new,
                total_tokens=prompt + new,
            ),
        )

    def _response(self, status: Any, output: list[OutputMessage], **more: Any) -> ResponseObject:
        body, generation = self._body, self._generation
        wanted = None if body.text is None else body.text.format
        return ResponseObject(
            id=f"resp_{generation.id.partition('-')[2]}",
            created_at=generation.created,
            status=status,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            model=generation.model,
            output=output,
            temperature=1.0 if body.temperature is None else body.temperature,
            text={"format": {"type": "text"} if wanted is None else wanted.written},
            top_p=1.0 if body.top_p is None else body.top_p,
            user=body.user,
            **more,
        )
