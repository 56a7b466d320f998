"""Rows for preference tuning, in TRL's schemas: which of two answers is preferred, or how one is judged.

A pair has ``prompt``, ``chosen`` and ``rejected``; a judged answer ``prompt``, ``completion`` and ``label``,
true or false. Each is a text, or in the conversational form a list of messages with ``role`` and ``content``:
those of the prompt end with the user's, and an answer is one message of the assistant. A pair of chats
without ``prompt``, as on the Hub, has all messages before the last in common.

An answer is encoded as an SFT row of that prompt would be. Each prompt gives two examples, one after the
other: the chosen and the rejected answer; or a judged answer, and for KTO's estimate of the divergence the
prompt with the answer of another row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from milora_jax.data.chat import Message
from milora_jax.data.conversations import (
    HEADS,
    REFUSED_OF_PAIRS,
    content_text,
    is_given,
    read_earlier,
    read_messages,
    refuse_unwritten,
)
from milora_jax.data.records import Reader, Record, user_text
from milora_jax.data.tokens import Example, encode_example, naming, require_embedded
from milora_jax.errors import UserError
from milora_jax.model_config import ModelConfig
from milora_jax.prompt_format import PromptFormat

ANSWERS = 2
"""Examples of each prompt."""

PAIR, JUDGED = ("chosen", "rejected"), ("completion", "label")
"""The fields beside ``prompt`` in either schema."""

UNLIMITED = np.iinfo(np.int32).max
"""Tokens of a row that is encoded whatever its length."""


def reader_of(objective: str) -> Reader | None:
    """The reader of an objective's training and dev rows; None for those of ``data.records``.

    Args:
      objective: one of ``config.OBJECTIVES``.
    """
    if objective == "sft":
        return None
    return read_judged if objective == "kto" else read_pair


def read_pair(row: dict[str, Any], where: str) -> list[Record]:
    """Read a row with a chosen and a rejected answer.

    Raises:
      UserError: the row has another schema, an answer is empty, or both are equal; the error begins with
        ``where``.
    """
    _require_schema(row, PAIR, where)
    if not is_given(row.get("prompt")):
        row = _with_prompt(row, where)
    asked = _asked(row, where)
    chosen, rejected = (_answer(row, name, asked, where) for name in PAIR)
    if chosen.strip() == rejected.strip():
        raise UserError(f"{where}: fields 'chosen' and 'rejected' are equal, expected a preference")
    return [replace(asked, output=chosen, answer=chosen.strip(), rejected=rejected)]


def read_judged(row: dict[str, Any], where: str) -> list[Record]:
    """Read a row with an answer and whether it is desirable.

    Raises:
      UserError: the row has another schema, the answer is empty or the label no boolean; the error begins
        with ``where``.
    """
    _require_schema(row, JUDGED, where)
    asked, label = _asked(row, where), row["label"]
    if not isinstance(label, bool):
        raise UserError(f"{where}: field 'label' is {label!r}, expected true or false")
    answer = _answer(row, "completion", asked, where)
    return [replace(asked, output=answer, answer=answer.strip(), label=label)]


def _require_schema(row: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    """Refuse a row of another schema, and one with fields that would change its meaning."""
    refuse_unwritten(row, where, REFUSED_OF_PAIRS)
    others = [name for name in (*HEADS, "input", *PAIR, *JUDGED) if name not in names]
    expected = "prompt, chosen and rejected" if names == PAIR else "prompt, completion and label"
    for name in names:
        if row.get(name) is None:
            has = ", ".join(map(repr, row)) or "no fields"
            raise UserError(
                f"{where}: field {name!r} holds nothing, the objective learns from {expected}: the row has "
                f"{has}, and data.columns maps columns of other names"
            )
    for name in others:
        # Labels and scores stand beside many pairs of the Hub, and say nothing else.
        if is_given(row.get(name)) and name != "label":
            raise UserError(
                f"{where}: field {name!r} stands beside {names[0]!r}, the objective learns from {expected}: "
                f"expected data.columns={name}= to leave it out"
            )


def _with_prompt(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The row of two chats with their common messages as its prompt."""
    chats = [row[name] for name in PAIR]
    if any(isinstance(chat, str) or not isinstance(chat, Sequence) for chat in chats):
        raise UserError(f"{where}: field 'prompt' holds nothing, expected text or a list of messages")
    read = [read_messages(chat, name, where, "assistant") for chat, name in zip(chats, PAIR, strict=True)]
    if read[0][:-1] != read[1][:-1]:
        raise UserError(
            f"{where}: the prompt is no prefix of both answers: the messages of 'chosen' and 'rejected' "
            "differ before the last one"
        )
    chosen, rejected = ([chat[-1]] for chat in chats)
    return {**row, "prompt": list(chats[0][:-1]), "chosen": chosen, "rejected": rejected}


def _asked(row: Mapping[str, Any], where: str) -> Record:
    """The prompt of a row, as that of an SFT row with the same instruction or messages."""
    given = row.get("prompt")
    if isinstance(given, Sequence) and not isinstance(given, str):
        if is_given(row.get("history")):
            raise UserError(f"{where}: field 'history' stands beside a 'prompt' of messages, expected one")
        messages = read_messages(given, "prompt", where, "user")
        if is_given(row.get("system")):
            if messages[0].role == "system":
                raise UserError(f"{where}: field 'system' stands beside another system message, expected one")
            messages = (Message("system", content_text(row, "system", where)), *messages)
        return Record(messages[-1].content, "", "", "", messages)
    text = content_text(row, "prompt", where)
    if not (earlier := read_earlier(row, where)):
        return Record(text, "", "", "")
    return Record(text, "", "", "", (*earlier, Message("user", user_text(text, ""))))


def _answer(row: Mapping[str, Any], name: str, asked: Record, where: str) -> str:
    """The text of an answer; a chat may repeat the prompt's messages before it."""
    given = row[name]
    if not isinstance(given, Sequence) or isinstance(given, str):
        return content_text(row, name, where)
    answer = list(given)
    if len(answer) > 1 and asked.messages:
        read = read_messages(answer, name, where, "assistant")
        if read[:-1] != asked.messages:
            raise UserError(f"{where}: field {name!r}: the prompt is no prefix of its messages")
        answer = answer[-1:]
    if len(answer) != 1 or not isinstance(answer[0], Mapping) or answer[0].get("role") != "assistant":
        raise UserError(f"{where}: field {name!r}: expected one message of the assistant")
    for field in answer[0]:
        if field not in ("role", "content") and is_given(answer[0][field]):
            raise UserError(f"{where}: field {name!r}: field {field!r} of the message is not supported")
    return content_text(answer[0], "content", f"{where}: field {name!r}")


def encode_preferences(
    keep: Callable[[Example], Any],
    tokenizer: Any,
    records: Iterable[Record],
    model: ModelConfig,
    max_length: int,
    prompt_format: PromptFormat,
) -> None:
    """Encode records one after the other; each gives two examples to ``keep``.

    The second example of a judged answer has the answer of the row before, as in TRL, which rotates the
    answers of a batch; the first row has that of the second. It is cut where it would not fit, because
    nothing is learned from it.

    Raises:
      UserError: a prompt with an answer is longer than ``max_length``, both answers have the same tokens, or
        a row cannot be encoded; the error names the row. Or a single row is judged, or there is none.
    """
    waiting: Example | None = None
    before: Example | None = None
    count = 0
    for record in records:
        count += 1
        examples = _encoded(tokenizer, record, model, max_length, prompt_format)
        if len(examples) == ANSWERS:
            for example in examples:
                keep(example)
            continue
        (example,) = examples
        if before is None:
            waiting = example
        else:
            if waiting is not None:
                keep(waiting)
                keep(_mismatched(waiting, example, max_length))
                waiting = None
            keep(example)
            keep(_mismatched(example, before, max_length))
        before = example
    if waiting is not None:
        raise UserError("one judged answer is too few: kto compares with the answers of other rows")
    if not count:
        raise UserError("there are no preference rows")


def _encoded(
    tokenizer: Any, record: Record, model: ModelConfig, max_length: int, prompt_format: PromptFormat
) -> list[Example]:
    """The examples of a record's own answers."""
    wanted = [replace(record, rejected="", label=None)]
    if record.label is None:
        wanted.append(replace(wanted[0], output=record.rejected))
    names = PAIR if record.label is None else JUDGED[:1]
    examples = []
    for each, name in zip(wanted, names, strict=True):
        example = encode_example(tokenizer, each, model.eos_ids, UNLIMITED, prompt_format)
        if example is None:
            raise AssertionError("no row is longer than that")
        with naming(record):
            if len(example.tokens) > max_length:
                raise UserError(
                    f"the prompt with {name!r} has {len(example.tokens)} tokens: expected at most "
                    f"data.max_length {max_length}"
                )
            require_embedded(tokenizer, example.tokens, model.vocab_size)
        label = name == "chosen" if record.label is None else record.label
        examples.append(replace(example, label=label))
    with naming(record):
        if len(examples) == ANSWERS and np.array_equal(examples[0].tokens, examples[1].tokens):
            raise UserError("'chosen' and 'rejected' have the same tokens, expected a preference")
        first = examples[0]
        for other in examples[1:]:
            prompts = [each.tokens[: each.prompt_length] for each in (first, other)]
            if not np.array_equal(*prompts):
                raise UserError("the tokens of the prompt are no prefix of both answers")
    return examples


def _mismatched(example: Example, other: Example, max_length: int) -> Example:
    """The prompt of one example with the answer of another, at most ``max_length`` tokens."""
    prompt, answer = example.tokens[: example.prompt_length], other.tokens[other.prompt_length :]
    tokens = np.concatenate([prompt, answer])[:max_length]
    return replace(example, tokens=tokens, answers=())
