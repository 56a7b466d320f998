"""Request bodies as pydantic models, and the generation settings that they ask for.

Field names and meanings are those of OpenAI's API; ``top_k``, ``min_p``, ``repetition_penalty``,
``ignore_eos`` and ``stop_token_ids`` are vLLM's. ``serving.unsupported`` lists the fields that are known and
not supported. An unknown field is refused: a misspelt field must not silently mean its default.
"""

from __future__ import annotations

import secrets
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic_core import PydanticCustomError

from milora_jax.base.json_files import parse_json_object
from milora_jax.data.chat import UNWRITABLE, Message
from milora_jax.errors import UserError
from milora_jax.generation.settings import LARGEST_SEED, MOST_LOGPROBS, GenerationSettings
from milora_jax.serving.api_errors import APIError, bad_request
from milora_jax.serving.format_fields import FormatFields
from milora_jax.serving.limits import Limits
from milora_jax.serving.tool_fields import ToolFields, ToolMessageFields
from milora_jax.serving.unsupported import (
    ADAPTER,
    CHAT,
    COMPLETION,
    MESSAGE,
    STREAM_OPTIONS,
    UNSUPPORTED,
    Unsupported,
    describe,
    without_unsupported,
)

Number = Annotated[float, Field(allow_inf_nan=False)]


class _HashableFailFast(FailFast):
    """pydantic's ``FailFast`` is not hashable, and members of a union must be."""

    def __hash__(self) -> int:
        return id(self)


FAIL_FAST = _HashableFailFast()
"""Validation of a list ends at its first invalid entry: a body may hold a megabyte of them."""

BOUNDED = Field(max_length=4096)
"""A list whose own limit, a smaller one, is in ``serving.limits``."""

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]

Ignored = Annotated[str, Field(max_length=256)] | None
"""Names a client or a conversation, and has no effect on the response."""


class RequestBase(BaseModel):
    """A body, or an object in one: no type is coerced, no unknown field is accepted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    unsupported: ClassVar[Unsupported] = {}
    """Fields that are known and not supported."""

    @model_validator(mode="before")
    @classmethod
    def _drop_unsupported(cls, values: Any) -> Any:
        return without_unsupported(values, cls.unsupported) if isinstance(values, dict) else values

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core)
        describe(handler.resolve_ref_schema(schema), cls.unsupported)
        return schema


class StreamOptions(RequestBase):
    """What a stream contains besides text."""

    unsupported = STREAM_OPTIONS

    include_usage: bool | None = None


class MiloraOptions(RequestBase):
    """Options of this server alone."""

    return_route: bool | None = None


class GenerationRequest(FormatFields, RequestBase):
    """The fields that completions and chat completions share.

    ``user``, ``safety_identifier`` and ``prompt_cache_key`` have no effect. ``cache_salt`` keeps the prefix
    cache of a request apart from that of requests with another one, as in vLLM.
    """

    model: str
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str], BOUNDED, FAIL_FAST] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    user: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=16), FAIL_FAST] | None = None
    milora: MiloraOptions | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def return_route(self) -> bool:
        """Whether the response contains the route of the prompt."""
        return bool(self.milora and self.milora.return_route)

    @property
    def token_limit(self) -> int | None:
        """Longest continuation, where the client gives one."""
        return self.max_tokens

    @abstractmethod
    def logprobs_wanted(self) -> int:
        """Most probable tokens that are wanted for each token; 0 for no log-probabilities at all."""

    def settings(self, limits: Limits, prompt_tokens: int, context: int, default: int) -> GenerationSettings:
        """The settings of the engine.

        Args:
          prompt_tokens: length of the prompt.
          context: tokens of a prompt and its continuation together.
          default: ``max_tokens`` where none is given; 0 for what the context leaves.

        Raises:
          APIError: naming the field.
        """
        room = context - prompt_tokens
        wanted = self.token_limit or min(default or room, room)
        if room < 1 or wanted > room:
            raise bad_request(
                f"This model has a context of {context} tokens (--context): the prompt has {prompt_tokens} "
                f"and {max(wanted, 1)} were asked for.",
                "max_tokens" if self.token_limit else "prompt",
                "context_length_exceeded",
            )
        if (self.n or 1) > limits.most_samples:
            raise bad_request(f"n is {self.n}: at most --samples {limits.most_samples}.", "n")
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > limits.stops or any(not 0 < len(s) <= limits.stop_characters for s in stops):
            raise bad_request(
                f"stop: at most --stops {limits.stops} strings of 1 to --stop-characters "
                f"{limits.stop_characters}.",
                "stop",
            )
        sampled = self.temperature is None or self.temperature > 0
        seed = secrets.randbelow(LARGEST_SEED) if self.seed is None else self.seed % (LARGEST_SEED + 1)
        try:
            return GenerationSettings(
                max_new_tokens=wanted,
                temperature=1.0 if self.temperature is None else self.temperature,
                top_k=max(0, self.top_k or 0) if sampled else 0,
                top_p=(self.top_p or 1.0) if sampled else 1.0,
                min_p=(self.min_p or 0.0) if sampled else 0.0,
                repetition_penalty=self.repetition_penalty or 1.0,
                presence_penalty=self.presence_penalty or 0.0,
                seed=seed,
                stop=tuple(stops),
                stop_token_ids=tuple(self.stop_token_ids or ()),
                ignore_eos=bool(self.ignore_eos),
                logprobs=self.logprobs_wanted(),
                num_samples=self.n or 1,
            )
        except UserError as error:
            raise bad_request(f"{error}.") from None


class CompletionRequest(GenerationRequest):
    """``/v1/completions``."""

    unsupported = COMPLETION

    prompt: Annotated[str, Field(min_length=1)] | Annotated[list[TokenId], Field(min_length=1), FAIL_FAST]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    def logprobs_wanted(self) -> int:
        """At least one where any are wanted: OpenAI's 0 means the token's own alone."""
        return 0 if self.logprobs is None else max(1, self.logprobs)


class ChatMessage(ToolMessageFields, RequestBase):
    """A message of a chat. Its content may be null beside calls of tools."""

    unsupported = MESSAGE

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    name: Annotated[str, Field(max_length=64)] | None = None

    @model_validator(mode="after")
    def _require_content(self) -> ChatMessage:
        if self.content is None and not self.tool_calls:
            raise PydanticCustomError("content", "a message without tool_calls has to have a content")
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("tool_calls", "only an assistant's message may have tool_calls")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise PydanticCustomError("tool_call_id", "a message of role tool has a tool_call_id, no other")
        return self

    @property
    def characters(self) -> int:
        """Length of all its texts."""
        calls = [call.function for call in self.tool_calls or ()]
        return len(self.content or "") + sum(len(call.name) + len(call.arguments) for call in calls)

    @property
    def message(self) -> Message:
        """The message, as chat templates take it.

        Raises:
          APIError: the arguments of a call are no JSON object.
        """
        calls = tuple(call.for_template() for call in self.tool_calls or ())
        return Message(self.role, self.content or "", calls, self.tool_call_id or "")


class ChatRequest(ToolFields, GenerationRequest):
    """``/v1/chat/completions``."""

    unsupported = CHAT

    messages: Annotated[list[ChatMessage], Field(min_length=1), BOUNDED, FAIL_FAST]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def token_limit(self) -> int | None:
        """OpenAI's newer name, or the older one."""
        return self.max_completion_tokens or self.max_tokens

    def logprobs_wanted(self) -> int:
        """At least one where any are wanted."""
        return max(1, self.top_logprobs or 0) if self.logprobs else 0

    @model_validator(mode="after")
    def _require_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            message = "top_logprobs is not served without logprobs: expected logprobs true"
            raise PydanticCustomError(UNSUPPORTED, message, {"field": "top_logprobs"})
        return self

    def chat(self, limits: Limits) -> list[Message]:
        """The messages.

        Raises:
          APIError: there are too many.
        """
        if len(self.messages) > limits.messages:
            found = len(self.messages)
            raise bad_request(f"messages has {found}: at most --messages {limits.messages}.", "messages")
        return [message.message for message in self.messages]


class AdapterRequest(RequestBase):
    """``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``."""

    unsupported = ADAPTER

    lora_name: Annotated[str, Field(max_length=64)]


def parse_body(content: bytes) -> dict[str, Any]:
    """The JSON object of a body, whatever its fields.

    Raises:
      APIError: it is none, or has a name twice or a character that no tokenizer can take.
    """
    try:
        values = parse_json_object(content, "The body")
    except UserError:
        raise bad_request("The body is not a JSON object without doubled names.") from None
    pending: list[Any] = [values]
    while pending:
        value = pending.pop()
        if isinstance(value, str) and UNWRITABLE.search(value):
            raise bad_request("The body holds a lone surrogate or a NUL character.")
        if isinstance(value, dict):
            pending += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            pending += value
    return values


def invalid_request(errors: Sequence[Mapping[str, Any]]) -> APIError:
    """The error for a body that a model does not accept, naming the field.

    Args:
      errors: as :meth:`pydantic.ValidationError.errors` has them.
    """
    first = errors[0]
    location = first["loc"]
    field = str(location[0])[:80] if location else ""
    if first["type"] == "extra_forbidden":
        unknown = str(location[-1])[:80]
        return bad_request(f"Unrecognized request argument supplied: {unknown!r}.", unknown)
    if first["type"] == UNSUPPORTED:
        name = ".".join(part for part in (field, first["ctx"]["field"]) if part)
        return bad_request(f"{first['msg']}.", name, "unsupported_parameter")
    return bad_request(f"{field}: {first['msg']}.", field or None)
