"""Chats through the tokenizer's own chat template: the one way from messages to token ids.

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
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

from milora_jax.errors import UserError, one_of
from milora_jax.prompt_format import parse_time

ROLES = ("system", "user", "assistant")
DEVELOPER = "developer"
"""OpenAI's newer name of the role ``system``, which it becomes where the template does not know it."""

UNWRITABLE = re.compile("[\0\ud800-\udfff]")
"""Characters that no tokenizer can take, or none should."""

MAX_CHARACTERS = 4_000_000
"""Longest rendered chat: about a million tokens. More is a mistake of the template, or no prompt."""

OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Set around control tokens in messages. Unicode promises that no text holds these two; one that does
is treated as a control token itself."""


class UnclosedThoughtError(UserError):
    """An answer would be learned inside a thought that the chat template has opened."""


@dataclass(frozen=True)
class Message:
    """One message of a chat; its role is one of ROLES, or DEVELOPER."""

    role: str
    content: str


Messages: TypeAlias = Sequence[Message | Mapping[str, Any]]
"""A chat as callers give it: messages, or mappings of ``role`` and ``content``."""


def as_messages(chat: Messages) -> tuple[Message, ...]:
    """The messages of a chat.

    A field beside ``role`` and ``content`` that holds something is refused: without it the message says
    something else.

    Raises:
      UserError: naming the message and what is wrong with it, or for an empty chat.

    >>> as_messages([{"role": "user", "content": "Hello."}])
    (Message(role='user', content='Hello.'),)
    """
    if not chat:
        raise UserError("the chat is empty: expected at least one message")
    return tuple(_as_message(item, number) for number, item in enumerate(chat, 1))


def _as_message(item: Message | Mapping[str, Any], number: int) -> Message:
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
    one_of(f"the role of message {number}", item.role, ROLES if item.role != DEVELOPER else (DEVELOPER,))
    if not isinstance(item.content, str):
        found = type(item.content).__name__
        raise UserError(f"the content of message {number} is of type {found}: expected text")
    if UNWRITABLE.search(item.content):
        raise UserError(f"message {number} holds a lone surrogate or a NUL character: expected text")
    return item


def render_chat(
    tokenizer: Any, messages: Messages, add_generation_prompt: bool = True, *, time: str = ""
) -> str:
    """The text that the template makes of a chat, for a reader: :func:`encode_chat` knows what is control.

    Args:
      tokenizer: from ``milora_jax.data.tokens.load_tokenizer``.
      messages: see :func:`as_messages`.
      add_generation_prompt: end with what an assistant's turn begins with.
      time: what ``strftime_now`` tells the template, see ``prompt_format.PromptFormat``.

    Raises:
      UserError: the chat is empty or has a role unknown here, the tokenizer has no template, or the template
        refuses the chat or fails.
    """
    marked = _render(tokenizer, as_messages(messages), add_generation_prompt, time)
    return "".join(text for text, _ in _pieces(tokenizer, marked))


def encode_chat(
    tokenizer: Any, messages: Messages, *, add_generation_prompt: bool = True, time: str = ""
) -> list[int]:
    """Ids of a chat up to where the assistant's next turn begins.

    Where the template writes a beginning-of-sequence token there is one, and where it writes none there
    is none: the models that come with such a template were tuned without it.

    Args:
      messages, add_generation_prompt, time: as :func:`render_chat` takes them.

    Raises:
      UserError: as :func:`render_chat`.
    """
    return _encode(tokenizer, _render(tokenizer, as_messages(messages), add_generation_prompt, time))


def encode_exchange(
    tokenizer: Any, messages: Messages, content: str, eos_ids: Sequence[int], *, time: str = ""
) -> tuple[list[int], list[int]]:
    """Ids of a chat, as :func:`encode_chat` gives them, and of the assistant's turn that follows.

    Those of the turn are what the template writes for it, up to the first token that ends an answer; what
    follows that (a line break, mostly) would never be generated. A template that ends a turn with no such
    token gets the first of ``eos_ids``. Some templates write a turn differently once it is history:
    DeepSeek-R1's leaves the thoughts out, so its text does not go on from the prompt's. The turn is then
    ``content`` as given, and the token that the template ends turns with.

    A template may open a thought (``<think>``) at the end of the prompt. The turn goes on inside it: the
    tag is not repeated where ``content`` begins with it, and a turn that never closes the thought would be
    learned as one, so it is refused.

    Args:
      messages, time: as :func:`render_chat` takes them.
      content: of the turn.
      eos_ids: tokens that end an answer, at least one.

    Raises:
      UserError: as :func:`render_chat`.
      UnclosedThoughtError: the template opens a thought that ``content`` does not close.
    """
    said, turn = as_messages(messages), *as_messages([Message("assistant", content)])
    prompt = _render(tokenizer, said, True, time)
    whole = _render(tokenizer, [*said, turn], False, time)
    goes_on = whole.startswith(prompt)
    text = whole[len(prompt) :] if goes_on else _controls_of(tokenizer).mark("assistant", content)
    if OPEN_THOUGHT.search(prompt):
        closed = _render(tokenizer, said, False, time)
        # A tag that a message ends with, and not the template, opens nothing.
        text = _within_thought(prompt.removeprefix(closed), text)
    before, answer = _encode_behind(tokenizer, prompt, text)
    if goes_on:
        ends = [i for i, token in enumerate(answer) if token in eos_ids]
        answer = answer[: ends[0] + 1] if ends else [*answer, eos_ids[0]]
        if len(answer) > 1:
            return before, answer
        answer = _encode(tokenizer, _controls_of(tokenizer).mark("assistant", content))
    ends = [token for token in _encode(tokenizer, whole) if token in eos_ids]
    return before, [*answer, ends[-1] if ends else eos_ids[0]]


def _encode_behind(tokenizer: Any, prompt: str, text: str) -> tuple[list[int], list[int]]:
    """Ids of a marked prompt, and of the marked text behind it."""
    before, both = _encode(tokenizer, prompt), _encode(tokenizer, prompt + text)
    # Encoded in its place: a tokenizer may put a space before a text that stands alone.
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
"""What opens and closes a thought in the templates of the models that have them."""

OPEN_THOUGHT = re.compile(f"({'|'.join(map(re.escape, THOUGHTS))})(\\s*)\\Z")
"""A thought that is open at the end of a prompt, and the space behind its tag."""


def _within_thought(opened: str, text: str) -> str:
    """What of an answer is still to be written where a thought may be open already.

    Args:
      opened: what the template has begun the answer with.

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


def template_source(tokenizer: Any) -> str:
    """The program text of the tokenizer's template: two tokenizers with the same one write chats alike.

    Raises:
      UserError: there is none, or there are several and none is called ``default``.
    """
    found = tokenizer.chat_template
    if isinstance(found, dict):
        names = ", ".join(sorted(map(str, found)))
        found = found.get("default")
        if found is None:
            raise UserError(f"the tokenizer has the chat templates {names}: expected one called 'default'")
    if not isinstance(found, str):
        what = "no chat template" if found is None else f"a chat template of type {type(found).__name__}"
        raise UserError(f"the tokenizer has {what}: expected the tokenizer of a chat model")
    return found


@dataclass(frozen=True)
class _Controls:
    """Texts that a tokenizer takes for control tokens.

    Attributes:
      special: matches its special tokens.
      every: matches those, and added tokens that the template writes: ``<|im_start|>`` is no special token
        in some tokenizers.
      marked: matches a control token between marks, or a mark that the template tore off.
      added: ids of all added tokens.
    """

    special: re.Pattern[str]
    every: re.Pattern[str]
    marked: re.Pattern[str]
    added: frozenset[int]

    def mark(self, role: str, content: str) -> str:
        """``content`` with every control token in it between marks.

        An assistant may write what is no special token: the tokens around its thoughts are such.
        """
        pattern = self.special if role == "assistant" else self.every
        return pattern.sub(f"{OPEN}\\g<0>{CLOSE}", content)


def _controls_of(tokenizer: Any) -> _Controls:
    return _controls(tokenizer, template_source(tokenizer), len(tokenizer))


@lru_cache(maxsize=8)
def _controls(tokenizer: Any, source: str, size: int) -> _Controls:
    """``size`` is the tokenizer's length: one that grew is looked at again."""
    added = tokenizer.added_tokens_decoder
    special = {token.content for token in added.values() if token.special}
    special |= {text for text in tokenizer.all_special_tokens if isinstance(text, str)}
    written = {token.content for token in added.values() if token.content in source}
    written = {text for text in written if not text.isspace()}  # "\n" is a token of Gemma, and no control

    def pattern(texts: set[str]) -> str:
        longest_first = sorted({*texts, OPEN, CLOSE} - {""}, key=lambda text: (-len(text), text))
        return "|".join(map(re.escape, longest_first))

    every = pattern(special | written)
    return _Controls(
        special=re.compile(pattern(special)),
        every=re.compile(every),
        marked=re.compile(f"{OPEN}({every}){CLOSE}|[{OPEN}{CLOSE}]"),
        added=frozenset(added),
    )


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
"""Hides transformers' function of the same name, which asks the clock, from the template that follows.
Templates are given plain data, so a function cannot be passed. Its last line break is the block's."""


@lru_cache(maxsize=64)
def _directives(time: str) -> dict[str, str]:
    """What ``strftime`` makes of each directive at a time."""
    told = parse_time(time)
    names = [f"%{flag}{letter}" for flag in ("-", "_", "0", "^", "#", "") for letter in string.ascii_letters]
    found = {name: told.strftime(name) for name in names}
    return {name: value for name, value in found.items() if value != name}


def _render(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool, time: str) -> str:
    """The rendered chat, with marks around the control tokens that its messages hold."""
    source, controls = template_source(tokenizer), _controls_of(tokenizer)
    clock = {}
    if time and asks_for_time(tokenizer):
        source, clock = CLOCK + source, {"directives_of_strftime": _directives(time)}
    known = any(f"{quote}{DEVELOPER}{quote}" in source for quote in "'\"")
    roles = {} if known else {DEVELOPER: "system"}
    chat = [
        {"role": roles.get(m.role, m.role), "content": controls.mark(m.role, m.content)} for m in messages
    ]
    try:
        text = tokenizer.apply_chat_template(
            chat, chat_template=source, tokenize=False, add_generation_prompt=add_generation_prompt, **clock
        )
    except Exception as error:  # the template is a program of others, and may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        said = ", ".join(message.role for message in messages[:4]) + (", ..." if len(messages) > 4 else "")
        raise UserError(f"the chat template cannot write a chat of {said}: {reason[:300]}") from None
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"the chat template wrote {len(text)} characters: expected at most {MAX_CHARACTERS}")
    return text


def _pieces(tokenizer: Any, marked: str) -> list[tuple[str, bool]]:
    """The parts of a marked text; True for one that reads like a control token and is none."""
    controls = _controls_of(tokenizer)
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
    """Ids of a control token's text that are not the control token."""
    ids = _ids(tokenizer, text, split=True)
    controls = _controls_of(tokenizer)
    if controls.added.isdisjoint(ids):
        return ids
    # An added token that is not special is found in any text that holds it whole.
    return [token for character in text for token in _ids(tokenizer, character, split=True)]


def _ids(tokenizer: Any, text: str, split: bool) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split)
