"""``/tokenize`` and ``/detokenize``, with vLLM's fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, Field, model_validator

from milora_jax.data.chat import encode_chat
from milora_jax.data.tokens import encode_prompt
from milora_jax.errors import UserError
from milora_jax.prompt_format import PromptFormat
from milora_jax.serving.api_errors import bad_request
from milora_jax.serving.limits import Limits
from milora_jax.serving.request_base import BOUNDED, FAIL_FAST, RequestBase, TokenId, contradiction
from milora_jax.serving.requests import ChatMessage, chat_messages
from milora_jax.serving.unsupported import TOKENIZE


class TokenizeRequest(RequestBase):
    """The body of ``/tokenize``: the prompt of a completion, or the messages of a chat.

    Without a model it is the first that the key may use.
    """

    unsupported = TOKENIZE

    model: str | None = None
    prompt: Annotated[str, Field(min_length=1)] | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1), BOUNDED, FAIL_FAST] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise contradiction("prompt", "prompt is missing, or given beside messages: expected one of them")
        if self.messages is not None and self.add_special_tokens:
            message = "add_special_tokens is of prompts: the template of a chat writes its own"
            raise contradiction("add_special_tokens", message)
        if self.messages is None and self.add_generation_prompt:
            raise contradiction(
                "add_generation_prompt", "add_generation_prompt is of chats: expected messages"
            )
        return self

    @property
    def texts(self) -> list[str]:
        """The texts to tokenize."""
        return [message.text for message in self.messages or ()] or [self.prompt or ""]


class DetokenizeRequest(RequestBase):
    """The body of ``/detokenize``."""

    model: str | None = None
    tokens: Annotated[list[TokenId], FAIL_FAST]

    def require_served(self, vocab_size: int, context: int) -> None:
        """Refuse tokens that no response or prompt could have.

        Raises:
          APIError: naming the field.
        """
        wrong = next((token for token in self.tokens if token >= vocab_size), None)
        if wrong is not None:
            raise bad_request(f"tokens has {wrong}: expected 0 to {vocab_size - 1}.", "tokens")
        if len(self.tokens) > context:
            raise bad_request(f"tokens has {len(self.tokens)}: at most --context {context}.", "tokens")


class TokenizeResponse(BaseModel):
    """The response of ``/tokenize``."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(BaseModel):
    """The response of ``/detokenize``."""

    prompt: str


@dataclass(frozen=True)
class Tokenized:
    """A prompt in tokens.

    Attributes:
      strings: the tokens as the tokenizer's vocabulary has them, where asked for.
      context: tokens of a prompt and its continuation together.
    """

    tokens: list[int]
    strings: list[str] | None
    context: int


def tokenized(
    tokenizer: Any, body: TokenizeRequest, prompt_format: PromptFormat, limits: Limits, context: int
) -> Tokenized:
    """Return token ids as a generation would have them.

    Args:
      prompt_format: prompt format of the adapter.

    Raises:
      APIError: the prompt cannot be written.
    """
    try:
        if body.prompt is None:
            opened, time = body.add_generation_prompt is not False, prompt_format.time
            messages = chat_messages(body.messages or (), limits)
            ids = encode_chat(tokenizer, messages, opened, time=time)
        elif body.add_special_tokens is False:
            ids = tokenizer.encode(body.prompt, add_special_tokens=False)
        else:
            rule = prompt_format.special_tokens
            ids = encode_prompt(tokenizer, body.prompt, rule, parse_special_tokens=True)
    except UserError as error:
        raise bad_request(f"{error}.") from None
    strings = tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
    return Tokenized(ids, strings, context)
