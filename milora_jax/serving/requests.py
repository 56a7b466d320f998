"""Request bodies as pydantic models, and the generation settings that they ask for.

Field names and meanings are those of OpenAI's API; ``top_k``, ``min_p``, ``repetition_penalty``,
``ignore_eos`` and ``stop_token_ids`` are vLLM's. ``serving.unsupported`` lists the fields that are known and
not supported. An unknown field is refused: a misspelt field must not silently mean its default.
"""

from __future__ import annotations

import json
import secrets
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from milora_jax.data.chat import Message
from milora_jax.errors import UserError
from milora_jax.generation.settings import LARGEST_SEED, MOST_BIASES, MOST_LOGPROBS, GenerationSettings
from milora_jax.serving.api_errors import bad_request
from milora_jax.serving.format_fields import FormatFields
from milora_jax.serving.limits import Limits
from milora_jax.serving.request_base import (
    BOUNDED,
    FAIL_FAST,
    Ignored,
    Number,
    RequestBase,
    TokenId,
    TokenIds,
    contradiction,
)
from milora_jax.serving.tool_fields import ToolFields, ToolMessageFields
from milora_jax.serving.unsupported import (
    ADAPTER,
    CHAT,
    COMPLETION,
    MESSAGE,
    STREAM_OPTIONS,
    TEXT_PART,
    UNSUPPORTED,
)

LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")], Annotated[Number, Field(ge=-100, le=100)]],
    Field(max_length=MOST_BIASES),
]
"""Token ids as text, and the numbers that are added to their logits."""

Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
"""Labels, which have no effect here: nothing is stored."""


class StreamOptions(RequestBase):
    """What a stream contains besides text."""

    unsupported = STREAM_OPTIONS

    include_usage: bool | None = None


class MiloraOptions(RequestBase):
    """Options of this server alone."""

    return_route: bool | None = None


class GenerationRequest(FormatFields):
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
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: LogitBias | None = None
    metadata: Metadata | None = None
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
        """The longest continuation, where the client gives one."""
        return self.max_tokens

    @property
    def samples(self) -> int:
        """Number of samples of each prompt."""
        return self.n or 1

    @abstractmethod
    def logprobs_wanted(self) -> int:
        """Number of most probable tokens to return for each token; 0 for no log-probabilities at all."""

    def prompt_logprobs_wanted(self) -> int:
        """Number of most probable tokens to return for each token of the prompt; 0 for none."""
        return 0

    def settings(self, limits: Limits, prompt_tokens: int, context: int, default: int) -> GenerationSettings:
        """Return the settings of the engine.

        Args:
          prompt_tokens: length of the prompt.
          context: tokens of a prompt and its continuation together.
          default: ``max_tokens`` where none is given; 0 for what the context leaves.

        Raises:
          APIError: naming the field.
        """
        room = context - prompt_tokens
        least = 0 if self.token_limit == 0 else 1
        wanted = self.token_limit if self.token_limit is not None else min(default or room, room)
        if room < least or wanted > room:
            raise bad_request(
                f"This model has a context of {context} tokens (--context): the prompt has {prompt_tokens} "
                f"and {max(wanted, least)} were asked for.",
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
                frequency_penalty=self.frequency_penalty or 0.0,
                logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
                seed=seed,
                stop=tuple(stops),
                stop_token_ids=tuple(self.stop_token_ids or ()),
                ignore_eos=bool(self.ignore_eos),
                logprobs=self.logprobs_wanted(),
                prompt_logprobs=self.prompt_logprobs_wanted(),
                num_samples=self.samples,
            )
        except UserError as error:
            raise bad_request(f"{error}.") from None


class CompletionRequest(GenerationRequest):
    """The body of ``/v1/completions``."""

    unsupported = COMPLETION

    prompt: (
        Annotated[str, Field(min_length=1)]
        | TokenIds
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1), BOUNDED, FAIL_FAST]
        | Annotated[list[TokenIds], Field(min_length=1), BOUNDED, FAIL_FAST]
    )
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None

    def logprobs_wanted(self) -> int:
        """The number is at least one where any are wanted: OpenAI's 0 means the token's own alone."""
        return 0 if self.logprobs is None else max(1, self.logprobs)

    def prompt_logprobs_wanted(self) -> int:
        """The number for an echo; an echo without a new token computes them even if none are returned."""
        return max(self.logprobs_wanted(), int(self.max_tokens == 0)) if self.echo else 0

    @property
    def texts(self) -> list[str | list[int]]:
        """The prompts, each a text or its token ids."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return cast(Any, [self.prompt] if one else self.prompt)

    def prompts(self, limits: Limits) -> list[str | list[int]]:
        """The prompts.

        Raises:
          APIError: there are too many.
        """
        if len(self.texts) > limits.prompts:
            raise bad_request(f"prompt has {len(self.texts)}: at most --prompts {limits.prompts}.", "prompt")
        return self.texts

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise contradiction("max_tokens", "max_tokens is 0: expected at least 1, or echo true")
        if self.return_route and len(self.texts) > 1:
            raise contradiction("milora", "milora.return_route is of one prompt: expected no other")
        return self


class TextPart(RequestBase):
    """A part of a message."""

    unsupported = TEXT_PART

    type: Literal["text"]
    text: str


class ChatMessage(ToolMessageFields):
    """A message of a chat. Its content may be null beside calls of tools."""

    unsupported = MESSAGE

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1), BOUNDED, FAIL_FAST] | None = None
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
    def text(self) -> str:
        """The content; each of its parts is on its own lines, as in vLLM."""
        content = self.content or ""
        return content if isinstance(content, str) else "\n".join(part.text for part in content)

    @field_validator("content", mode="before")
    @classmethod
    def _refuse_other_parts(cls, content: Any) -> Any:
        require_parts(content, ("text",))
        return content

    @property
    def characters(self) -> int:
        """Length of all texts of the message."""
        calls = [call.function for call in self.tool_calls or ()]
        return len(self.text) + sum(len(call.name) + len(call.arguments) for call in calls)

    @property
    def message(self) -> Message:
        """The message in the form that chat templates take.

        Raises:
          APIError: the arguments of a call are no JSON object.
        """
        calls = tuple(call.for_template() for call in self.tool_calls or ())
        return Message(self.role, self.text, calls, self.tool_call_id or "")


def require_parts(content: Any, kinds: tuple[str, ...]) -> None:
    """Refuse a part of a message that is no text, by its type.

    Raises:
      PydanticCustomError: naming the type.
    """
    parts = content if isinstance(content, list) else []
    found = (part["type"] for part in parts if isinstance(part, dict) and "type" in part)
    wrong = next((kind for kind in found if isinstance(kind, str) and kind not in kinds), None)
    if wrong is not None:
        message = "a content part of type {kind} is not supported: expected {expected}"
        context = {"field": "content", "kind": json.dumps(wrong[:40]), "expected": " or ".join(kinds)}
        raise PydanticCustomError(UNSUPPORTED, message, context)  # pyright: ignore[reportArgumentType]


def chat_messages(messages: Sequence[ChatMessage], limits: Limits) -> list[Message]:
    """Return the messages of a chat.

    Raises:
      APIError: there are too many.
    """
    if len(messages) > limits.messages:
        found = len(messages)
        raise bad_request(f"messages has {found}: at most --messages {limits.messages}.", "messages")
    return [message.message for message in messages]


class ChatRequest(ToolFields, GenerationRequest):
    """The body of ``/v1/chat/completions``."""

    unsupported = CHAT

    messages: Annotated[list[ChatMessage], Field(min_length=1), BOUNDED, FAIL_FAST]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def token_limit(self) -> int | None:
        """The limit under OpenAI's newer name, or under the older one."""
        return self.max_completion_tokens or self.max_tokens

    def logprobs_wanted(self) -> int:
        """The number is at least one where any are wanted."""
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
        return chat_messages(self.messages, limits)

    @property
    def texts(self) -> list[str]:
        """The contents of the messages."""
        return [message.text for message in self.messages]

    def prompts(self, limits: Limits) -> list[ChatRequest]:
        """The one prompt, which is this chat."""
        return [self]


class AdapterRequest(RequestBase):
    """The body of ``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``."""

    unsupported = ADAPTER

    lora_name: Annotated[str, Field(max_length=64)]
