"""Response bodies as pydantic models, in the shape of OpenAI's API.

A response is serialized without the fields that were not set: every field that it shall have is given to its
constructor, the constant ones too.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]
FinishReason = Literal["stop", "length", "tool_calls"]


class ErrorDetail(BaseModel):
    """What is wrong with a request."""

    model_config = ConfigDict(extra="forbid")

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every error."""

    model_config = ConfigDict(extra="forbid")

    error: ErrorDetail


class PromptTokens(BaseModel):
    """Details about the tokens of the prompt."""

    cached_tokens: Count


class Usage(BaseModel):
    """Numbers of tokens of the prompt and of all samples."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptTokens


class RouteInfo(BaseModel):
    """Routing weights of the prompt, layers by experts."""

    experts: list[str]
    route: list[list[float]]


class CompletionLogprobs(BaseModel):
    """Log-probabilities of the tokens of a completion; the first token of an echo has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """A sample of a completion, or a part of it in a stream."""

    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class _Response(BaseModel):
    id: str
    created: int
    model: str
    usage: Usage | None = None
    milora: RouteInfo | None = None


class CompletionResponse(_Response):
    """The response of ``/v1/completions``, and an event of its stream."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class TopLogprob(BaseModel):
    """A token of a chat completion with its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of a chat completion with its log-probability and the most probable tokens at its position."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of the tokens of a chat completion."""

    content: list[TokenLogprob]


class CalledFunction(BaseModel):
    """A call: the arguments are a JSON object, as text."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(BaseModel):
    """The message that the model writes; without content where it only calls tools."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """A sample of a chat completion."""

    index: Count
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatResponse(_Response):
    """The response of ``/v1/chat/completions``."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class FunctionDelta(BaseModel):
    """The part of a call that a stream event adds."""

    name: str | None = None
    arguments: str


class ToolCallDelta(BaseModel):
    """The beginning of a call, with its name, or more of its arguments."""

    index: Count
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatDelta(BaseModel):
    """The part of the message that a stream event adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(BaseModel):
    """A part of a sample in a stream."""

    index: Count
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(_Response):
    """An event of the stream of ``/v1/chat/completions``."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


class Model(BaseModel):
    """A base or an adapter that requests can name."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "milora_jax"


class ModelList(BaseModel):
    """The response of ``/v1/models``."""

    object: Literal["list"] = "list"
    data: list[Model]


class Liveness(BaseModel):
    """The response of ``/health/live``."""

    status: str


class Readiness(Liveness):
    """The response of ``/health/ready``.

    ``free_slots`` counts free batch slots, ``under_way`` the admitted requests.
    """

    free_slots: Count
    under_way: Count


class AdapterStatus(BaseModel):
    """The response of ``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``."""

    status: str
    lora_name: str


def as_json(response: BaseModel) -> bytes:
    """Return the JSON of a response without the fields that were not set."""
    return response.model_dump_json(exclude_unset=True).encode()


RETRY_AFTER = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}}

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    | ({"headers": RETRY_AFTER} if status in (429, 503) else {})
    for status, text in {
        400: "The request is invalid or not supported.",
        401: "The key is missing or wrong.",
        403: "The key may not make this call.",
        404: "There is no such path, model or adapter.",
        405: "The path has no such method.",
        408: "The body took too long.",
        413: "The body is too long.",
        415: "The body is not JSON by its headers.",
        429: "A limit of the tenant is reached.",
        431: "The head of the request is too long.",
        "4XX": "Another error of the client.",
        500: "An internal error.",
        503: "The server is overloaded or stopping.",
    }.items()
}
"""The errors of all calls, for the OpenAPI document."""
