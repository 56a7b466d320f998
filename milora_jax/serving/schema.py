"""Bodies of requests: their fields, checked to the last one, and the settings that they ask for.

Field names and meanings are those of OpenAI's API; ``top_k``, ``min_p``, ``repetition_penalty``,
``ignore_eos`` and ``stop_token_ids`` are vLLM's. ``serving.unserved`` has the fields that are known and not
served. A field that is not known is refused: a typo must not be a default.
"""

from __future__ import annotations

import secrets
from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from milora_jax.base.json_files import parse_json_object
from milora_jax.data.chat import UNWRITABLE, Message
from milora_jax.errors import UserError
from milora_jax.generation.settings import LARGEST_SEED, MOST_LOGPROBS, GenerationSettings
from milora_jax.serving.limits import Limits
from milora_jax.serving.refusal import bad_request
from milora_jax.serving.unserved import (
    CHAT,
    COMPLETION,
    MESSAGE,
    NAMED_ADAPTER,
    NOT_SERVED,
    STREAM_OPTIONS,
    Unserved,
    describe,
    without_unserved,
)

Number = Annotated[float, Field(allow_inf_nan=False)]


class _FirstMistake(FailFast):
    """pydantic's, which can stand in a union: those must be hashable."""

    def __hash__(self) -> int:
        return id(self)


FIRST = _FirstMistake()
"""Of a list the first wrong entry ends the check: a megabyte of wrong ones is not looked through."""

MANY = Field(max_length=4096)
"""Entries of a list whose own limit is in ``serving.limits``."""

Whole = Annotated[int, Field(ge=0, le=2**31 - 1)]


Ignored = Annotated[str, Field(max_length=256)] | None
"""What names a client or a conversation, and changes no answer."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    unserved: ClassVar[Unserved] = {}
    """Fields that are known and not served."""

    @model_validator(mode="before")
    @classmethod
    def _accept_what_asks_for_nothing(cls, values: Any) -> Any:
        return without_unserved(values, cls.unserved) if isinstance(values, dict) else values

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core)
        describe(handler.resolve_ref_schema(schema), cls.unserved)
        return schema


class StreamOptions(_Body):
    """What a stream says besides text."""

    unserved = STREAM_OPTIONS

    include_usage: bool | None = None


class MiloraOptions(_Body):
    """What this server can tell that others cannot."""

    return_route: bool | None = None


class Sampled(_Body):
    """What both kinds of requests have.

    ``user``, ``safety_identifier``, ``prompt_cache_key`` and ``cache_salt`` have no effect: requests
    share no cache.
    """

    model: str
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str], MANY, FIRST] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    user: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    cache_salt: Ignored = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[Whole], Field(max_length=16), FIRST] | None = None
    milora: MiloraOptions | None = None

    @property
    def counts_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def tells_route(self) -> bool:
        """Whether the answer has the prompt's route."""
        return bool(self.milora and self.milora.return_route)

    @abstractmethod
    def alternatives(self) -> int:
        """How many most probable tokens are asked for beside each; 0 is no log-probabilities at all."""

    def settings(self, limits: Limits, prompt_tokens: int, context: int, default: int) -> GenerationSettings:
        """What the engine is asked for.

        Args:
          prompt_tokens: length of the prompt.
          context: tokens of a prompt and its continuation together.
          default: longest continuation where none is given; 0 is what the context leaves.

        Raises:
          Refusal: naming the field.
        """
        room = context - prompt_tokens
        wanted = self.max_tokens or min(default or room, room)
        if room < 1 or wanted > room:
            raise bad_request(
                f"This model has a context of {context} tokens (--context): the prompt has {prompt_tokens} "
                f"and {max(wanted, 1)} were asked for.",
                "max_tokens" if self.max_tokens else "prompt",
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
                logprobs=self.alternatives(),
                num_samples=self.n or 1,
            )
        except UserError as error:
            raise bad_request(f"{error}.") from None


class Completion(Sampled):
    """``/v1/completions``."""

    unserved = COMPLETION

    prompt: Annotated[str, Field(min_length=1)] | Annotated[list[Whole], Field(min_length=1), FIRST]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    def alternatives(self) -> int:
        """At least one where any are asked for: 0 of OpenAI's is the token's own."""
        return 0 if self.logprobs is None else max(1, self.logprobs)


class Said(_Body):
    """A message."""

    unserved = MESSAGE

    role: Literal["system", "user", "assistant"]
    content: str
    name: Annotated[str, Field(max_length=64)] | None = None


class Chat(Sampled):
    """``/v1/chat/completions``."""

    unserved = CHAT

    messages: Annotated[list[Said], Field(min_length=1), MANY, FIRST]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    def alternatives(self) -> int:
        """At least one where any are asked for."""
        return max(1, self.top_logprobs or 0) if self.logprobs else 0

    @model_validator(mode="after")
    def _require_logprobs(self) -> Chat:
        if self.top_logprobs and not self.logprobs:
            message = "top_logprobs is not served without logprobs: expected logprobs true"
            raise PydanticCustomError(NOT_SERVED, message, {"field": "top_logprobs"})
        return self

    def chat(self, limits: Limits) -> list[Message]:
        """The messages.

        Raises:
          Refusal: there are too many.
        """
        if len(self.messages) > limits.messages:
            found = len(self.messages)
            raise bad_request(f"messages has {found}: at most --messages {limits.messages}.", "messages")
        return [Message(message.role, message.content) for message in self.messages]


class NamedAdapter(_Body):
    """``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``."""

    unserved = NAMED_ADAPTER

    lora_name: Annotated[str, Field(max_length=64)]


Parsed = TypeVar("Parsed", bound=_Body)


def parse(kind: type[Parsed], content: bytes) -> Parsed:
    """A body of a kind.

    Raises:
      Refusal: it is no such JSON; naming the field.
    """
    try:
        values = parse_json_object(content, "The body")
    except UserError:
        raise bad_request("The body is not a JSON object without doubled names.") from None
    _require_text(values)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"] if str(part) in kind.model_fields)[:80]
        if first["type"] == "extra_forbidden":
            unknown = str(first["loc"][-1])[:80]
            raise bad_request(f"Unrecognized request argument supplied: {unknown!r}.", unknown) from None
        if first["type"] == NOT_SERVED:
            name = ".".join(part for part in (place, first.get("ctx", {})["field"]) if part)
            raise bad_request(f"{first['msg']}.", name, "unsupported_parameter") from None
        raise bad_request(f"{place}: {first['msg']}.", place or None) from None


def _require_text(values: Any) -> None:
    """Refuse characters that no tokenizer can take, wherever they are."""
    waiting = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str) and UNWRITABLE.search(value):
            raise bad_request("The body holds a lone surrogate or a NUL character.")
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            waiting += value
