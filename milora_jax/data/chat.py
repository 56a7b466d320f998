"""Chats in the tokenizer's chat template: the only conversion of messages to token ids.

Training, scoring and generation call :func:`encode_chat`, so the router reads the same prompt in all of them.
The ids are those of Hugging Face's ``apply_chat_template``, with two differences: text in a message that
reads like a control token stays text, and a beginning-of-sequence token is never doubled.

The template is a program of the model's author. transformers runs it in jinja2's immutable sandbox, where it
reaches neither files nor Python's internals; nothing bounds its time or its memory while it runs.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

from milora_jax.data.control_tokens import (
    CLOSE,
    OPEN,
    Controls,
    controls_of,
    template_source,
    tool_template,
)
from milora_jax.errors import UserError, one_of
from milora_jax.prompt_format import parse_time

ROLES = ("system", "user", "assistant")
DEVELOPER = "developer"
"""OpenAI's newer name of the role ``system``, which it becomes where the template does not know it."""

UNWRITABLE = re.compile("[\0\ud800-\udfff]")
"""Characters that tokenizers cannot encode, or should not."""

MAX_CHARACTERS = 4_000_000
"""Longest rendered chat, about a million tokens. A longer one is a mistake of the template, or no prompt."""


class UnclosedThoughtError(UserError):
    """The chat template opens a thought that the answer does not close, so the answer would be part of it."""


@dataclass(frozen=True)
class Message:
    """One message of a chat; its role is one of ROLES, or DEVELOPER, or "tool".

    Attributes:
      tool_calls: calls that an assistant has made, as templates take them.
      tool_call_id: of the call whose result a message of a tool holds.
      name: of the tool whose result it is, where the row tells it.
    """

    role: str
    content: str
    tool_calls: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    tool_call_id: str = ""
    name: str = ""

    @property
    def of_tools(self) -> bool:
        """Whether it says something that only a template with tools can write."""
        return self.role == "tool" or bool(self.tool_calls)


Messages: TypeAlias = Sequence[Message | Mapping[str, Any]]
"""A chat as callers give it: messages, or mappings of ``role`` and ``content``."""

Tools: TypeAlias = Sequence[Mapping[str, Any]]
"""Tools as chat templates take them: JSON schemas of functions."""


def as_messages(chat: Messages) -> tuple[Message, ...]:
    """Check the messages of a chat and convert them.

    A field beside ``role`` and ``content`` that is not empty is refused, because the message would lose a
    part of its meaning.

    Raises:
      UserError: a message is wrong, or the chat is empty; the error names the message.

    >>> as_messages([{"role": "user", "content": "Hello."}])[0].content
    'Hello.'
    """
    if not chat:
        raise UserError("the chat is empty: expected at least one message")
    return tuple(_as_message(item, number) for number, item in enumerate(chat, 1))


def _as_message(item: Message | Mapping[str, Any], number: int) -> Message:
    roles = ROLES if isinstance(item, Mapping) else (*ROLES, "tool")
    if isinstance(item, Mapping):
        unknown = [name for name, value in item.items() if name not in ("role", "content") and value]
        if unknown:
            raise UserError(f"message {number} has a field {unknown[0]!r}: expected role and content alone")
        if "content" not in item:
            raise UserError(f"message {number} has no content: expected a text")
        item = Message(item.get("role", ""), item["content"])
    if not isinstance(item, Message):
        found = type(item).__name__
        raise UserError(f"message {number} is of type {found}: expected a role and a content")
    one_of(f"the role of message {number}", item.role, roles if item.role != DEVELOPER else (DEVELOPER,))
    if not isinstance(item.content, str):
        found = type(item.content).__name__
        raise UserError(f"the content of message {number} is of type {found}: expected text")
    if UNWRITABLE.search(item.content):
        raise UserError(f"message {number} holds a lone surrogate or a NUL character: expected text")
    return item


def render_chat(
    tokenizer: Any,
    messages: Messages,
    add_generation_prompt: bool = True,
    *,
    time: str = "",
    tools: Tools = (),
) -> str:
    """Render a chat as text for people; only :func:`encode_chat` tells control tokens from text.

    Args:
      tokenizer: from ``milora_jax.data.tokens.load_tokenizer``.
      messages: see :func:`as_messages`.
      add_generation_prompt: end with the beginning of an assistant's turn.
      time: result of ``strftime_now`` in the template, see ``prompt_format.PromptFormat``.
      tools: as templates take them; these and the calls in messages need a template that writes them, see
        :func:`tool_template`.

    Raises:
      UserError: the chat is empty or has an unknown role, the tokenizer has no template, or the template
        refuses the chat or fails.
    """
    marked = _render(tokenizer, as_messages(messages), add_generation_prompt, time, tools)
    return "".join(text for text, _ in _pieces(tokenizer, marked))


def encode_chat(
    tokenizer: Any,
    messages: Messages,
    add_generation_prompt: bool = True,
    *,
    time: str = "",
    tools: Tools = (),
) -> list[int]:
    """Ids of a chat up to where the assistant's next turn begins.

    There is a beginning-of-sequence token if and only if the template writes one: models with such a template
    were trained so.

    Args:
      messages, add_generation_prompt, time, tools: as :func:`render_chat` takes them.

    Raises:
      UserError: see :func:`render_chat`.
    """
    return _encode(tokenizer, _render(tokenizer, as_messages(messages), add_generation_prompt, time, tools))


def encode_exchange(
    tokenizer: Any,
    messages: Messages,
    answer: Message | str,
    eos_ids: Sequence[int],
    *,
    time: str = "",
    tools: Tools = (),
) -> tuple[list[int], list[int]]:
    """Encode a chat, as :func:`encode_chat` does, and the assistant's turn that follows.

    The ids of the turn are what the template writes for it, up to the first token that ends an answer; what
    follows that, mostly a line break, would never be generated. A turn that the template ends without such a
    token gets the first of ``eos_ids``. Some templates write past turns differently: DeepSeek-R1's leaves the
    thoughts out, so that its text does not continue the prompt's. The turn is then its content as given, and
    the token with which the template ends turns.

    A template may open a thought (``<think>``) at the end of the prompt, and the turn continues inside it:
    the tag is not repeated where the content begins with it. A turn that never closes the thought would be
    learned as a thought, so it is refused.

    Args:
      messages, time, tools: see :func:`render_chat`.
      answer: the turn, or the content of one that has nothing else.
      eos_ids: tokens that end an answer, at least one.

    Raises:
      UserError: see :func:`render_chat`; or the template does not write the calls of the turn.
      UnclosedThoughtError: the template opens a thought that the content does not close.
    """
    turn = Message("assistant", answer) if isinstance(answer, str) else answer
    said, (turn,) = as_messages(messages), as_messages([turn])
    prompt = _render(tokenizer, said, True, time, tools)
    whole = _render(tokenizer, [*said, turn], False, time, tools)
    goes_on = whole.startswith(prompt)
    as_given = controls_of(tokenizer).mark("assistant", turn.content)
    text = whole[len(prompt) :] if goes_on else as_given
    _require_calls(turn, text)
    if OPEN_THOUGHT.search(prompt):
        closed = _render(tokenizer, said, False, time, tools)
        # A tag at the end of a message, not of the template, opens no thought.
        text = _within_thought(prompt.removeprefix(closed), text)
    before, ids = _encode_behind(tokenizer, prompt, text)
    if goes_on:
        ends = [i for i, token in enumerate(ids) if token in eos_ids]
        ids = ids[: ends[0] + 1] if ends else [*ids, eos_ids[0]]
        if len(ids) > 1:
            return before, ids
        ids = _encode(tokenizer, as_given)
    ends = [token for token in _encode(tokenizer, whole) if token in eos_ids]
    return before, [*ids, ends[-1] if ends else eos_ids[0]]


def _require_calls(turn: Message, text: str) -> None:
    """Refuse calls that the template leaves out of the turn, or writes otherwise than it began the turn."""
    for call in turn.tool_calls:
        name = call["function"]["name"]
        if name not in text:
            raise UserError(f"the chat template does not write the call of {name!r} where the answer begins")


def _encode_behind(tokenizer: Any, prompt: str, text: str) -> tuple[list[int], list[int]]:
    """Encode a marked prompt, and the marked text after it."""
    before, both = _encode(tokenizer, prompt), _encode(tokenizer, prompt + text)
    # Encoded together: a tokenizer may put a space before a text of its own.
    joined = both[: len(before)] == before
    return before, both[len(before) :] if joined else _encode(tokenizer, text)


THOUGHTS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",
    "\u25c1think\u25b7": "\u25c1/think\u25b7",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|begin_of_thought|>": "<|end_of_thought|>",
}
"""The tags that open and close a thought in the templates of reasoning models."""

OPEN_THOUGHT = re.compile(f"({'|'.join(map(re.escape, THOUGHTS))})(\\s*)\\Z")
"""An open thought at the end of a prompt, and the space after its tag."""


def _within_thought(opened: str, text: str) -> str:
    """The part of an answer that is still to be written, where a thought may be open already.

    Args:
      opened: the beginning of the answer that the template has written.

    Raises:
      UnclosedThoughtError: the answer does not close the thought.
    """
    found = OPEN_THOUGHT.search(opened)
    if found is None:
        return text
    opening, space = found.groups()
    if THOUGHTS[opening] not in text:
        raise UnclosedThoughtError(
            f"the chat template opens a thought ({opening}) where the answer begins, and the answer does "
            f"not close it: expected an answer of the form THOUGHT{THOUGHTS[opening]}ANSWER"
        )
    if not text.lstrip().startswith(opening):
        return text
    return text.lstrip().removeprefix(opening).removeprefix(space)


def asks_for_time(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template writes the time, or the day, into its chats."""
    return "strftime_now" in template_source(tokenizer)


CLOCK = """\
{%- macro strftime_now(format) -%}
{%- for part in format.split('%%') -%}
{%- set written = namespace(text=part) -%}
{%- for directive, value in directives_of_strftime.items() -%}
{%- set written.text = written.text.replace(directive, value) -%}
{%- endfor -%}
{{- written.text -}}{{- '' if loop.last else '%' -}}
{%- endfor -%}
{%- endmacro %}
"""
"""Replaces transformers' function of the same name, which reads the clock, in the template that follows.
Templates get plain data, so a function cannot be passed. Its last line break is the block's."""


@lru_cache(maxsize=64)
def _directives(time: str) -> dict[str, str]:
    """The result of ``strftime`` for each directive at a time."""
    told = parse_time(time)
    names = [f"%{flag}{letter}" for flag in ("-", "_", "0", "^", "#", "") for letter in string.ascii_letters]
    found = {name: told.strftime(name) for name in names}
    return {name: value for name, value in found.items() if value != name}


def _render(
    tokenizer: Any,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    time: str,
    tools: Tools = (),
) -> str:
    """The rendered chat, with marks around the control tokens that its messages and tools hold."""
    source, controls = template_source(tokenizer), controls_of(tokenizer)
    of_tools = bool(tools) or any(message.of_tools for message in messages)
    if of_tools:
        with_tools = tool_template(tokenizer)
        if with_tools is None:
            raise UserError("the chat template of this model has no place for tools and their calls")
        source = with_tools
    clock = {}
    if time and asks_for_time(tokenizer):
        source, clock = CLOCK + source, {"directives_of_strftime": _directives(time)}
    known = any(f"{quote}{DEVELOPER}{quote}" in source for quote in "'\"")
    chat = [_for_template(message, controls, known) for message in messages]
    marked_tools = {"tools": controls.mark_all(list(tools))} if tools else {}
    try:
        text = tokenizer.apply_chat_template(
            chat,
            chat_template=source,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **marked_tools,
            **clock,
        )
    except Exception as error:  # the template is foreign code, which may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        said = ", ".join(message.role for message in messages[:4]) + (", ..." if len(messages) > 4 else "")
        raise UserError(f"the chat template cannot write a chat of {said}: {reason[:300]}") from None
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"the chat template wrote {len(text)} characters: expected at most {MAX_CHARACTERS}")
    if of_tools:
        # A template may write JSON in ASCII, marks too.
        text = text.replace(r"\ufdd0", OPEN).replace(r"\ufdd1", CLOSE)
    return text


def _for_template(message: Message, controls: Controls, has_developer: bool) -> dict[str, Any]:
    """A message as templates take it, marked."""
    fields: dict[str, Any] = {
        "role": "system" if message.role == DEVELOPER and not has_developer else message.role,
        "content": controls.mark(message.role, message.content),
    }
    if message.tool_calls:
        fields["tool_calls"] = controls.mark_all(message.tool_calls)
    for name in ("tool_call_id", "name"):
        if value := getattr(message, name):
            fields[name] = controls.mark_all(value)
    return fields


def _pieces(tokenizer: Any, marked: str) -> list[tuple[str, bool]]:
    """The parts of a marked text; True for one that reads like a control token and is none."""
    controls = controls_of(tokenizer)
    pieces, plain, at = [], "", 0
    for match in controls.marked.finditer(marked):
        plain, at = plain + marked[at : match.start()], match.end()
        if match[1] is not None:
            pieces += [(plain, False), (match[1], True)]
            plain = ""
    return [piece for piece in (*pieces, (plain + marked[at:], False)) if piece[0]]


def _encode(tokenizer: Any, marked: str) -> list[int]:
    ids: list[int] = []
    for text, literal in _pieces(tokenizer, marked):
        ids += _literal(tokenizer, text) if literal else _ids(tokenizer, text, split=False)
    while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        del ids[0]
    return ids


def _literal(tokenizer: Any, text: str) -> list[int]:
    """Ids of the text of a control token, without the control token itself."""
    ids = _ids(tokenizer, text, split=True)
    controls = controls_of(tokenizer)
    if controls.added.isdisjoint(ids):
        return ids
    # A tokenizer finds an added token that is not special in any text that holds it whole.
    return [token for character in text for token in _ids(tokenizer, character, split=True)]


def _ids(tokenizer: Any, text: str, split: bool) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split)
