"""Rows that hold a whole chat, in the two forms they are kept in.

OpenAI: ``{"messages": [{"role": "user", "content": "..."}, ...]}``. ShareGPT: ``{"conversations":
[{"from": "human", "value": "..."}, ...]}``, where ``gpt`` answers. An optional system message comes first, or
stands beside the list as ``system``; then user and assistant take turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from milora_jax.data.chat import ROLES, UNWRITABLE, Message
from milora_jax.errors import UserError


@dataclass(frozen=True)
class _Form:
    """How a kind of row names things."""

    role: str
    content: str
    roles: Mapping[str, str]


FORMS = {
    "messages": _Form("role", "content", {role: role for role in ROLES}),
    "conversations": _Form("from", "value", {"system": "system", "human": "user", "gpt": "assistant"}),
}
"""By the field of the row that holds the list."""

TOOLS = ("tools", "functions", "tool_calls", "function_call")
"""Fields of rows and messages without which they do not mean what they say."""


def chat_field(row: Mapping[str, Any]) -> str | None:
    """The field that makes a row a chat; None where it is none."""
    return next((name for name in FORMS if row.get(name) is not None), None)


def read_chat(row: Mapping[str, Any], where: str, last: str = "assistant") -> tuple[Message, ...]:
    """The messages of a row that :func:`chat_field` knows.

    Args:
      where: file and line, for errors.
      last: the role that must have the last word: the assistant's, to learn from; the user's, to answer.

    Raises:
      UserError: naming ``where``, the message and what is wrong with it.
    """
    name = chat_field(row)
    if name is None:
        raise UserError(f"{where}: expected a field {' or '.join(map(repr, FORMS))}")
    form, listed = FORMS[name], row[name]
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        raise UserError(f"{where}: field {name!r} holds {type(listed).__name__}, expected a list of messages")
    _refuse_tools(row, f"{where}: the row")
    messages = [_message(item, form, f"{where}: message {i}") for i, item in enumerate(listed, 1)]
    if row.get("system"):
        if messages and messages[0].role == "system":
            raise UserError(f"{where}: field 'system' stands beside a system message, expected one of them")
        messages.insert(0, Message("system", content_text(row, "system", where)))
    _require_turns(messages, where, last)
    return tuple(messages)


def content_text(row: Mapping[str, Any], name: str, where: str, required: bool = True) -> str:
    """The text of a field.

    Args:
      required: it must be there, and must not be blank.

    Raises:
      UserError: naming ``where``, the field and what it holds.
    """
    value = row.get(name, None if required else "")
    if not isinstance(value, str):
        found = "nothing" if name not in row else type(value).__name__
        raise UserError(f"{where}: field {name!r} holds {found}, expected text")
    if required and not value.strip():
        raise UserError(f"{where}: field {name!r} is empty")
    if UNWRITABLE.search(value):
        raise UserError(f"{where}: field {name!r} holds a lone surrogate or a NUL character")
    return value


def _message(item: Any, form: _Form, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise UserError(f"{where}: expected an object, found {type(item).__name__}")
    _refuse_tools(item, where)
    role = content_text(item, form.role, where)
    if role not in form.roles:
        raise UserError(f"{where}: {form.role} is {role!r}, expected one of {', '.join(form.roles)}")
    return Message(form.roles[role], content_text(item, form.content, where))


def _refuse_tools(item: Mapping[str, Any], where: str) -> None:
    for name in TOOLS:
        if item.get(name):
            raise UserError(f"{where} has a field {name!r}: expected a chat without tools")


def _require_turns(messages: Sequence[Message], where: str, last: str) -> None:
    start = 1 if messages and messages[0].role == "system" else 0
    for i, message in enumerate(messages[start:]):
        expected = ("user", "assistant")[i % 2]
        if message.role != expected:
            place = f"{where}: message {i + start + 1}"
            raise UserError(f"{place} is of the {message.role}, expected one of the {expected}")
    if len(messages) == start:
        raise UserError(f"{where}: the chat has no messages of a user")
    if messages[-1].role != last:
        raise UserError(
            f"{where}: the last message is of the {messages[-1].role}, expected one of the {last}"
        )
