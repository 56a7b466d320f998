"""Rows that hold a whole chat, the system message and history of plain rows, and fields that are refused.

OpenAI: ``{"messages": [{"role": "user", "content": "..."}, ...]}``. ShareGPT: ``{"conversations":
[{"from": "human", "value": "..."}, ...]}``, where ``gpt`` answers. An optional system message is the first
message, or the field ``system`` beside the list; then user and assistant take turns. An answer is learned
unless its ``weight`` (OpenAI), ``train`` or ``training`` (Axolotl) or ``loss`` (ms-swift) is 0 or false.
An answer may be calls of ``tools`` (see ``data.tool_calls``), after which messages of the tools come.

A plain row with a ``system`` message or a ``history`` of earlier turns (LLaMA-Factory) is a chat as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

from milora_jax.data.chat import ROLES, UNWRITABLE, Message
from milora_jax.data.tool_calls import CALLS, TOOLS, read_call_text, read_calls
from milora_jax.errors import UserError


@dataclass(frozen=True)
class _Form:
    """The names of the fields in a kind of row."""

    role: str
    content: str
    roles: Mapping[str, str]


FORMS = {
    "messages": _Form("role", "content", {role: role for role in (*ROLES, "tool")}),
    "conversations": _Form(
        "from",
        "value",
        {
            **{"system": "system", "human": "user", "gpt": "assistant"},
            **{"function_call": "assistant", "observation": "tool"},
        },
    ),
}
"""The kinds of chats, by the field of the row that holds the list."""

HEADS = (*FORMS, "instruction", "question")
"""Fields each of which decides the kind of a row."""

WEIGHTS = ("weight", "train", "training", "loss")
"""Fields of a message that decide whether it is learned."""

_OF_TOOLS = ("name", CALLS, "tool_call_id")
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")

_UNWRITTEN = (
    *("functions", "function_call", "tool_calls", "tool_call_id"),
    *(*_MEDIA, "rejected_response", "kto_tag", "chat_template_kwargs"),
)
PREFERENCES = ("chosen", "rejected")
REFUSED_OF_ROWS = (*_UNWRITTEN, *PREFERENCES)
REFUSED_OF_PAIRS = (*_UNWRITTEN, TOOLS)
REFUSED_OF_MESSAGES = (
    *(TOOLS, "functions", "function_call", *_MEDIA),
    *("reasoning_content", "reasoning", "thinking", "refusal", "train_detail"),
)
"""Fields that change the meaning of a row or a message in the formats above, and are not supported."""


def is_given(value: Any) -> bool:
    """Whether a field has content: null, empty values and ``"[]"``, a list as text, have none."""
    return value is not None and value != "[]" and not (isinstance(value, Sized) and len(value) == 0)


def head_of(row: Mapping[str, Any], where: str) -> str | None:
    """The one of HEADS that a row holds; None if it holds none.

    Raises:
      UserError: a field is not supported, or two of HEADS are present; the error begins with ``where``.
    """
    refuse_unwritten(row, where, REFUSED_OF_ROWS)
    if is_given(row.get("system_prompt")):
        raise UserError(
            f"{where}: field 'system_prompt' has another name here: expected 'system', "
            "data.columns=system=system_prompt, or data.columns=system_prompt= to leave it out"
        )
    given = [name for name in HEADS if is_given(row.get(name))]
    if len(given) > 1:
        raise UserError(
            f"{where}: the row holds {given[0]!r} and {given[1]!r}, which begin two kinds of row: "
            f"expected one of them, or data.columns={given[1]}= to leave that out"
        )
    return next(iter(given or [name for name in HEADS if row.get(name) is not None]), None)


def refuse_unwritten(row: Mapping[str, Any], where: str, names: Sequence[str]) -> None:
    """Refuse a row with a field that would change its meaning and is not supported.

    Raises:
      UserError: one of the names has content; the error begins with ``where``.
    """
    for name in names:
        if is_given(row.get(name)):
            paired = "it is of pairs, which train.objective=dpo, ipo and orpo read, " * (name in PREFERENCES)
            raise UserError(
                f"{where}: field {name!r} is not supported: {paired}expected a row without it, "
                f"or data.columns={name}= to leave it out"
            )


def read_messages(listed: Any, name: str, where: str, last: str) -> tuple[Message, ...]:
    """Read a field that is a chat of ``role`` and ``content``, without tools.

    Args:
      name: name of the field.
      where: file and line, for errors.
      last: the role of the last message.

    Raises:
      UserError: the field is no list, or a message is wrong or out of turn; the error begins with ``where``.
    """
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        raise UserError(f"{where}: field {name!r} holds {type(listed).__name__}, expected a list of messages")
    place = f"{where}: field {name!r}"
    read = []
    for i, item in enumerate(listed, 1):
        message, _ = _message(item, FORMS["messages"], f"{place}: message {i}")
        if message.of_tools:
            raise UserError(f"{place}: message {i} is of a tool, or calls one, which is not supported here")
        read.append(message)
    _require_turns(read, place, last)
    return tuple(read)


def read_chat(row: Mapping[str, Any], where: str, last: str = "assistant") -> tuple[Message, ...]:
    """Read the messages of a row that holds one of FORMS.

    Args:
      where: file and line, for errors.
      last: the role of the last message: assistant for learning, user for answering, where it may be of a
        tool as well.

    Raises:
      UserError: a message is wrong; the error begins with ``where`` and names it.
    """
    return _chat(row, where, last)[0]


def read_answers(row: Mapping[str, Any], where: str) -> list[tuple[tuple[Message, ...], Message]]:
    """Read the answers that a row with one of FORMS teaches, each after the messages before it.

    Raises:
      UserError: see :func:`read_chat`; or no answer is learned.
    """
    messages, learned = _chat(row, where, "assistant")
    found = [turn for turn, counts in zip(answers_in(messages), learned, strict=True) if counts]
    if not found:
        raise UserError(f"{where}: every answer of the chat has weight 0: expected one that is learned")
    return found


def answers_in(messages: Sequence[Message]) -> Iterator[tuple[tuple[Message, ...], Message]]:
    """Yield each of the assistant's messages after all messages before it."""
    for i, message in enumerate(messages):
        if message.role == "assistant":
            yield tuple(messages[:i]), message


def read_earlier(row: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    """Read the ``system`` message and the turns of the ``history`` of a plain row.

    Raises:
      UserError: one of them is wrong; the error begins with ``where``.
    """
    messages = []
    if is_given(row.get("system")):
        messages.append(Message("system", content_text(row, "system", where)))
    history = row.get("history")
    if not is_given(history):
        return tuple(messages)
    expected = "expected a list of pairs, a question and its answer"
    if not isinstance(history, Sequence) or isinstance(history, str):
        raise UserError(f"{where}: field 'history' holds {type(history).__name__}, {expected}")
    for i, pair in enumerate(history, 1):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise UserError(f"{where}: field 'history': turn {i} is no pair, {expected}")
        named: dict[str, Any] = dict(zip(("question", "answer"), pair, strict=True))
        place = f"{where}: field 'history': turn {i}"
        messages.append(Message("user", content_text(named, "question", place)))
        messages.append(Message("assistant", content_text(named, "answer", place)))
    return tuple(messages)


def content_text(row: Mapping[str, Any], name: str, where: str, required: bool = True) -> str:
    """Read the text of a field.

    Args:
      required: whether it must be present and not blank; otherwise null and a missing field are "".

    Raises:
      UserError: it holds something else; the error begins with ``where`` and names the field.
    """
    value = row.get(name)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        found = "nothing" if name not in row else type(value).__name__
        raise UserError(f"{where}: field {name!r} holds {found}, expected text")
    if required and not value.strip():
        raise UserError(f"{where}: field {name!r} is empty")
    if UNWRITABLE.search(value):
        raise UserError(f"{where}: field {name!r} holds a lone surrogate or a NUL character")
    return value


def _chat(row: Mapping[str, Any], where: str, last: str) -> tuple[tuple[Message, ...], list[bool]]:
    """Read the messages, and whether each of the assistant's is learned."""
    name = head_of(row, where)
    if name not in FORMS:
        raise UserError(f"{where}: expected a field {' or '.join(map(repr, FORMS))}")
    form, listed = FORMS[name], row[name]
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        raise UserError(f"{where}: field {name!r} holds {type(listed).__name__}, expected a list of messages")
    if is_given(row.get("history")):
        raise UserError(f"{where}: field 'history' stands beside {name!r}, expected one of them")
    messages, learned = [], []
    for i, item in enumerate(listed, 1):
        message, counts = _message(item, form, f"{where}: message {i}")
        messages.append(message)
        learned += [counts] if message.role == "assistant" else []
    if is_given(row.get("system")):
        system = Message("system", content_text(row, "system", where))
        if messages and messages[0].role == "system" and messages[0] != system:
            raise UserError(
                f"{where}: field 'system' stands beside another system message, expected one of them"
            )
        messages = messages if messages[:1] == [system] else [system, *messages]
    _require_turns(messages, where, last)
    return tuple(messages), learned


def _message(item: Any, form: _Form, where: str) -> tuple[Message, bool]:
    """Read a message, and whether it is learned if it is the assistant's."""
    if not isinstance(item, Mapping):
        raise UserError(f"{where}: expected an object, found {type(item).__name__}")
    for name in REFUSED_OF_MESSAGES:
        if is_given(item.get(name)):
            raise UserError(f"{where}: field {name!r} is not supported: expected a message without it")
    role = content_text(item, form.role, where)
    if role not in form.roles:
        raise UserError(f"{where}: {form.role} is {role!r}, expected one of {', '.join(form.roles)}")
    message = _of_role(item, form, role, where)
    return message, _is_learned(item, message.role, where)


def _of_role(item: Mapping[str, Any], form: _Form, named: str, where: str) -> Message:
    """Read a message whose role has a name of the form."""
    role = form.roles[named]
    for name in _OF_TOOLS:
        if is_given(item.get(name)) and role != ("assistant" if name == CALLS else "tool"):
            raise UserError(f"{where}: field {name!r} is not supported: expected a message without it")
    if named == "function_call":
        return Message(role, "", read_call_text(content_text(item, form.content, where), where))
    calls = read_calls(item[CALLS], where) if is_given(item.get(CALLS)) else ()
    content = content_text(item, form.content, where, required=role != "tool" and not calls)
    given = (name for name in ("tool_call_id", "name") if is_given(item.get(name)))
    own = {name: content_text(item, name, where) for name in given}
    return Message(role, content, calls, **own)


def _is_learned(item: Mapping[str, Any], role: str, where: str) -> bool:
    weights = {name: item[name] for name in WEIGHTS if item.get(name) is not None}
    for name, value in weights.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise UserError(f"{where}: field {name!r} is {value!r}, expected 0 or 1")
        if value and role != "assistant":
            # Data sets write 0 beside users' messages, which are never learned.
            raise UserError(
                f"{where}: field {name!r} is {value!r}, expected 0: only what the assistant says is learned"
            )
        if bool(value) != bool(next(iter(weights.values()))):
            raise UserError(f"{where}: fields {' and '.join(map(repr, weights))} contradict each other")
    return all(weights.values())


def _require_turns(messages: Sequence[Message], where: str, last: str) -> None:
    start = 1 if messages and messages[0].role == "system" else 0
    expected, called = ("user",), set()
    for i, message in enumerate(messages[start:], start + 1):
        place = f"{where}: message {i}"
        if message.role not in expected:
            raise UserError(f"{place} is of the {message.role}, expected one of the {' or '.join(expected)}")
        called |= {call["id"] for call in message.tool_calls if "id" in call}
        if message.tool_call_id and called and message.tool_call_id not in called:
            raise UserError(f"{place}: tool_call_id {message.tool_call_id!r} is of no call before it")
        expected = _followers(message)
    if len(messages) == start:
        raise UserError(f"{where}: the chat has no messages of a user")
    ends = (last, "tool") if last == "user" else (last,)
    if messages[-1].role not in ends:
        raise UserError(
            f"{where}: the last message is of the {messages[-1].role}, expected one of the {last}"
        )


def _followers(message: Message) -> tuple[str, ...]:
    """The roles that the next message may have."""
    if message.tool_calls:
        return ("tool",)
    return {"user": ("assistant",), "assistant": ("user",)}.get(message.role, ("tool", "assistant"))
