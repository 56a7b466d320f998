"""Which tokens of a prompt the routers read: all of them, or those that a chat begins with.

``adapter.route_on`` names the part. With ``first_turn`` and ``system`` it ends where the chat template ends
that turn, before whatever the template writes behind it. Training, generation and serving all count it here,
so a route is the same in all of them, and at every turn of a conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from milora_jax.data.chat import Message, Messages, Tools, as_messages, encode_chat, render_chat
from milora_jax.errors import UserError
from milora_jax.prompt_format import PromptFormat


class RouteScopeError(UserError):
    """A prompt has no such part as ``adapter.route_on`` names, or none that stands apart."""


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model gets it.

    Attributes:
      ids: token ids.
      route_tokens: how many of them, from the first, the routers read; 0 is all.
    """

    ids: list[int]
    route_tokens: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def routed(self) -> list[int]:
        """The tokens that the routers read, which the route depends on alone: attention is causal."""
        return self.ids[: self.route_tokens or len(self.ids)]


def encode_messages(
    tokenizer: Any, messages: Messages, prompt_format: PromptFormat, tools: Tools = ()
) -> EncodedPrompt:
    """A chat up to where the assistant's next turn begins, as ``chat.encode_chat`` writes it with its tools.

    Raises:
      RouteScopeError: as :func:`route_tokens`.
      UserError: as ``chat.encode_chat``.
    """
    ids = encode_chat(tokenizer, messages, time=prompt_format.time, tools=tools)
    return EncodedPrompt(ids, route_tokens(tokenizer, messages, ids, prompt_format, tools))


def route_tokens(
    tokenizer: Any,
    messages: Messages,
    ids: Sequence[int],
    prompt_format: PromptFormat,
    tools: Tools = (),
) -> int:
    """How many tokens, from the first, of an encoded chat the routers read; 0 is all.

    They are those of the messages in question, written by the template as a chat of their own and without a
    generation prompt.

    Args:
      ids: of the chat.

    Raises:
      RouteScopeError: the chat has no such messages, or its tokens do not begin with theirs.
    """
    scope = prompt_format.route_on
    if scope == "prompt":
        return 0
    head, time = _head(as_messages(messages), scope), prompt_format.time
    try:
        leading = encode_chat(tokenizer, head, add_generation_prompt=False, time=time, tools=tools)
        text = render_chat(tokenizer, head, add_generation_prompt=False, time=time, tools=tools)
    except UserError as error:
        raise RouteScopeError(f"adapter.route_on is {scope!r}: {error}") from None
    # A template may keep a system message back for the user's.
    written = head[-1].content.strip() in text
    if not (leading and written) or list(ids[: len(leading)]) != leading:
        part = "the first turn" if scope == "first_turn" else "the system message"
        raise RouteScopeError(
            f"adapter.route_on is {scope!r}, and the chat template does not begin a chat with {part} as it "
            "writes it alone: expected another template, or an adapter with route_on=prompt"
        )
    return len(leading)


def whole_prompt(ids: list[int], prompt_format: PromptFormat) -> EncodedPrompt:
    """A prompt that is no chat: one turn, of which the routers read everything.

    Raises:
      RouteScopeError: they read a system message.
    """
    if prompt_format.route_on == "system":
        raise RouteScopeError(
            "adapter.route_on is 'system', and the prompt is no chat, so that it has no system message: "
            "expected a chat"
        )
    return EncodedPrompt(ids)


def require_history(tokens: Sequence[int], turn: Sequence[int], number: int) -> None:
    """Refuse a conversation whose template does not go on from one of its answers.

    Args:
      tokens: of the whole conversation.
      turn: of the prompt of an earlier answer, and of the answer.
      number: of the message that is the answer.

    Raises:
      RouteScopeError: naming the message.
    """
    if list(tokens[: len(turn)]) == list(turn):
        return
    if list(tokens[: len(turn) - 1]) == list(turn[:-1]):
        raise RouteScopeError(
            f"the chat template ends message {number} with no token that ends an answer, so the conversation "
            "cannot be one record: expected a model whose eos_token_id holds the one that ends turns, or "
            "adapter.route_on=prompt"
        )
    raise RouteScopeError(
        f"message {number}, or what comes before it, has other tokens once it is history, by the chat "
        "template or the tokenizer, so the conversation cannot be one record: expected "
        "adapter.route_on=prompt"
    )


def _head(messages: tuple[Message, ...], scope: str) -> tuple[Message, ...]:
    roles = [message.role for message in messages]
    if scope == "first_turn":
        if "user" not in roles:
            raise RouteScopeError(
                "adapter.route_on is 'first_turn', and the chat has no message of a user: expected one"
            )
        return messages[: roles.index("user") + 1]
    others = [i for i, role in enumerate(roles) if role != "system"]
    head = messages[: others[0] if others else len(messages)]
    if not head:
        raise RouteScopeError(
            "adapter.route_on is 'system', and the chat has no system message: expected one at its beginning"
        )
    return head
