"""Records from files and from the Hub, in four schemas.

Alpaca and LLM-Adapters: ``instruction``, ``input``, ``output``, ``answer``, ``references``; a missing
``answer`` is the output, and ``output`` may be missing where there are ``references``. GSM8K: ``question``
and ``answer``, a rationale that ends in ``#### N``. Chats (``messages`` or ``conversations``), and
``system``, ``history`` and ``tools`` of plain rows: see ``data.conversations``. Plain text without a
question: ``text`` alone. Rows with other names: see ``columns``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from milora_jax.columns import mapped_row
from milora_jax.data.chat import Message
from milora_jax.data.conversations import (
    FORMS,
    answers_in,
    content_text,
    head_of,
    is_given,
    read_answers,
    read_chat,
    read_earlier,
)
from milora_jax.data.rows import parse_row, rows_of
from milora_jax.data.sources import Source
from milora_jax.data.tool_calls import TOOLS, Call, read_tools
from milora_jax.data.unanswered import asks_only
from milora_jax.errors import UserError

BESIDE_TEXT = ("input", "output", "answer", "references", "system", "history", "label")
"""Fields that make a row with a ``text`` something else than a plain text."""


@dataclass(frozen=True)
class Record:
    """A question, the output to be written, and the short answer that is scored.

    A record has one prompt and one answer: a chat gives a record for each of the assistant's turns.
    ``tokens.encode_records`` puts them together again where they have one route.

    Attributes:
      instruction: the instruction; for a chat, the user's last message.
      messages: all messages of a chat before ``output``; empty where the row is no chat.
      rejected: the answer that ``output`` is preferred to; "" where the row is no pair.
      tools: that the chat offers, see ``data.tool_calls``.
      calls: of tools that the answer makes, beside ``output`` or without any text.
      label: whether ``output`` is desirable; None where the row does not judge it.
      references: texts that are each a right answer, for the measures of free text; empty where the row lists
        none, and ``output`` is the only one.
      is_text: whether ``output`` is a plain text, which no question comes before.
      where: file and line of the row, for errors; not part of the record's content.
      source: name of the data set that it comes from; not part of the content either.
    """

    instruction: str
    input: str
    output: str
    answer: str
    messages: tuple[Message, ...] = ()
    references: tuple[str, ...] = ()
    rejected: str = ""
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    calls: tuple[Call, ...] = field(default=(), hash=False)
    label: bool | None = None
    is_text: bool = False
    where: str = field(default="", compare=False)
    source: str = field(default="", compare=False)

    @property
    def answered(self) -> bool:
        """Whether there is an answer to compare others with."""
        return bool(self.answer or self.output or self.references)

    @property
    def turn(self) -> Message:
        """The answer as a message of a chat."""
        return Message("assistant", self.output, self.calls)


Reader = Callable[[dict[str, Any], str], "list[Record]"]
"""Reads the records of a row, given its file and line, or raises a UserError that begins with these."""


def iterate_records(source: Source, scored: bool = False, reader: Reader | None = None) -> Iterator[Record]:
    """Read the records of a source one after the other.

    Args:
      scored, reader: see :func:`read_records`.

    Raises:
      UserError: a row is malformed or incomplete; the error names file and line. Or there is no row.
    """
    empty = True
    for row, where in rows_of(source.location):
        mapped = mapped_row(_object(row, where), source.columns, where)
        records = _records(mapped, where, scored) if reader is None else reader(mapped, where)
        for record in records[-1:] if source.train_on == "last" else records:
            empty = False
            yield replace(record, where=where, source=source.name)
    if empty:
        raise UserError(f"{source.location}: the data set is empty")


@dataclass(frozen=True)
class Records:
    """The records of sources, read anew whenever they are iterated: no more than one row is in memory."""

    sources: tuple[Source, ...]
    reader: Reader | None = None

    def __iter__(self) -> Iterator[Record]:
        for source in self.sources:
            yield from iterate_records(source, reader=self.reader)


def read_records(source: Source, scored: bool = False, reader: Reader | None = None) -> list[Record]:
    """Read all records of a source.

    If its columns name the ``references``, every row has one of them (or some) for its prompt. Rows for
    training stay separate; rows for scoring that have equal prompts become one question with all their
    references.

    Args:
      scored: the rows are asked and scored, not trained on: ``output`` may be empty where ``answer`` is
        given, as in a row of LLM-Adapters' GSM8K test file. Where the first row is a question without any
        answer, all must be, and their records have none.
      reader: reads rows of other schemas, such as ``preferences.reader_of``; None reads those above.

    Raises:
      UserError: see :func:`iterate_records`.
    """
    records = list(iterate_records(source, scored, _scored_reader() if scored and reader is None else reader))
    mapped = any(column.field == "references" and not column.omits for column in source.columns)
    return _joined(records) if mapped and scored else records


def _joined(records: list[Record]) -> list[Record]:
    """Merge records of equal prompts at the place of the first, with all their references.

    Records with an ``answer`` other than their output are merged only where it is the same.
    """
    found: dict[tuple, Record] = {}
    for record in records:
        own = record.answer if record.answer != record.output.strip() else None
        key = (record.instruction, record.input, record.messages, json.dumps(record.tools), own)
        first = found.setdefault(key, record)
        own_texts = record.references or filter(str.strip, (record.output,))
        every = dict.fromkeys((*first.references, *own_texts))  # in their order, each once
        found[key] = replace(first, references=tuple(every))
    return list(found.values())


def by_row(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Records that are turns of one chat, together; each of the others alone."""
    row: list[Record] = []
    for record in records:
        before = row[-1] if row else None
        said = (*before.messages, before.turn) if before and before.messages else ()
        if said and record.messages[: len(said)] == said:
            row.append(record)
        else:
            if row:
                yield row
            row = [record]
    if row:
        yield row


def fingerprint(records: Iterable[Record], template: str = "") -> str:
    """SHA-256 over the records in order.

    Args:
      template: the program text of their chat template.
    """
    digest = hashlib.sha256(template.encode())
    for record in records:
        digest.update(record_bytes(record))
    return digest.hexdigest()


def record_bytes(record: Record) -> bytes:
    """The content of a record, as :func:`fingerprint` reads it."""
    values = asdict(record)
    del values["where"], values["source"]
    if not record.is_text:
        del values["is_text"]
    for name in ("messages", "references", "rejected", "tools", "calls", "label"):
        if values[name] in ((), "", None):
            del values[name]  # a run whose records had no such field can be resumed
    for message in values.get("messages", ()):
        if not message["name"]:
            del message["name"]  # the same
    return json.dumps(values, sort_keys=True).encode()


def read_question(text: str, where: str) -> Record:
    """Read the question of a line of JSON, a row of any schema, for generation; its answer is ignored.

    Args:
      where: file and line, for errors.

    Raises:
      UserError: the row is malformed; the error begins with ``where``.
    """
    return replace(_question(_object(parse_row(text, where), where), where), where=where)


def _question(row: dict[str, Any], where: str) -> Record:
    """The question of a row of any schema."""
    if (head := head_of(row, where)) in FORMS:
        messages = read_chat(row, where, last="user")
        return Record(messages[-1].content, "", "", "", messages, tools=_tools(row, where))
    return _asked(row, head, where)


def _scored_reader() -> Reader:
    """A reader of rows to score; the first row decides whether they have answers."""
    chosen: Reader | None = None

    def read(row: dict[str, Any], where: str) -> list[Record]:
        nonlocal chosen
        if chosen is None:
            chosen = _read_unanswered if asks_only(row, where) else functools.partial(_records, scored=True)
        return chosen(row, where)

    return read


def _read_unanswered(row: dict[str, Any], where: str) -> list[Record]:
    """Read a row of a data set whose first row has no answer."""
    if not asks_only(row, where):
        raise UserError(
            f"{where}: the row has an answer, or a field that is none of a question, and the first row has "
            "no answer: expected answers in all rows to be scored, or in none"
        )
    return [_question(row, where)]


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, found {type(row).__name__}")
    return row


def _records(row: dict[str, Any], where: str, scored: bool) -> list[Record]:
    """Read the records of one row of any schema."""
    head = head_of(row, where)
    if head in FORMS:
        records = _turns(read_answers(row, where), _tools(row, where))
        return _with_golds(_without_calls(records, where), row, where) if scored else records
    if head is None and row.get("text") is not None:
        return [_plain_text(row, where, scored)]
    asked, references = _asked(row, head, where), _references(row, where)
    if head == "question":
        output, answer = _gsm8k(row, where)
    else:
        has_answer = row.get("answer") is not None
        if references and not is_given(row.get("output")):
            output = references[0]
        else:
            required = not (scored and has_answer)
            output = content_text(
                _having(row, "output", where) if required else row, "output", where, required
            )
        answer = content_text(row, "answer", where) if has_answer else output.strip()
    last = replace(asked, output=output, answer=answer, references=references)
    return [*_turns(answers_in(asked.messages), asked.tools), last]


def _plain_text(row: dict[str, Any], where: str, scored: bool) -> Record:
    """Read a row that is a text and nothing else."""
    for name in BESIDE_TEXT:
        if is_given(row.get(name)):
            raise UserError(
                f"{where}: field {name!r} stands beside 'text', which is learned as a plain text: expected a "
                f"row without it, or data.columns={name}= to leave it out"
            )
    if scored:
        raise UserError(
            f"{where}: the row is a plain text, which asks nothing: expected a row to score; "
            "data.columns maps columns of other names"
        )
    return Record("", "", content_text(row, "text", where), "", is_text=True)


def _asked(row: dict[str, Any], head: str | None, where: str) -> Record:
    """The question of a plain row; with ``system``, ``history`` or ``tools`` it is a chat's last message."""
    if head == "question":
        instruction, given = content_text(row, "question", where), ""
    else:
        instruction = content_text(_having(row, "instruction", where), "instruction", where)
        given = content_text(row, "input", where, required=False)
    earlier, tools = read_earlier(row, where), _tools(row, where)
    if not earlier and not tools:
        return Record(instruction, given, "", "")
    text = user_text(instruction, given)
    return Record(text, "", "", "", (*earlier, Message("user", text)), tools=tools)


def _tools(row: dict[str, Any], where: str) -> tuple[Mapping[str, Any], ...]:
    return read_tools(row[TOOLS], where) if is_given(row.get(TOOLS)) else ()


def user_text(instruction: str, given: str) -> str:
    """Combine an instruction and its input to a user's message."""
    return f"{instruction}\n\n{given}" if given else instruction


def _having(row: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """The row, if it has a field; else raise a UserError."""
    if name not in row:
        has = ", ".join(map(repr, row)) or "no fields"
        judged = " (rows with 'completion' and 'label' are for train.objective=kto)" * ("completion" in row)
        raise UserError(
            f"{where}: field {name!r} holds nothing, expected text: the row has {has}, "
            f"and data.columns maps columns of other names{judged}"
        )
    return row


def _references(row: dict[str, Any], where: str) -> tuple[str, ...]:
    """The row's ``references``: a list of right answers, or a single text."""
    value = row.get("references")
    if not is_given(value):
        return ()
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list | tuple):
        raise UserError(f"{where}: field 'references' holds {type(value).__name__}, expected a list of texts")
    named = {f"references[{i}]": text for i, text in enumerate(listed)}
    return tuple(content_text(named, name, where) for name in named)


def _turns(
    answers: Iterable[tuple[tuple[Message, ...], Message]], tools: tuple[Mapping[str, Any], ...]
) -> list[Record]:
    """Make a record for each answer of a chat."""
    return [
        Record(
            before[-1].content,
            "",
            turn.content,
            turn.content.strip(),
            before,
            tools=tools,
            calls=turn.tool_calls,
        )
        for before, turn in answers
    ]


def _without_calls(records: list[Record], where: str) -> list[Record]:
    """The records, if none of their answers is a call."""
    for record in records:
        if record.calls:
            raise UserError(
                f"{where}: message {len(record.messages) + 1} calls a tool, and calls are not scored: "
                'expected an answer in text, or "weight": 0 beside the call'
            )
    return records


def _with_golds(records: list[Record], row: dict[str, Any], where: str) -> list[Record]:
    """Add ``answer`` and ``references`` of a row to its chat's only record."""
    given = [name for name in ("answer", "references") if is_given(row.get(name))]
    if not given:
        return records
    if len(records) != 1:
        raise UserError(
            f"{where}: field {given[0]!r} stands beside a chat of {len(records)} answers: "
            f"expected one answer, or data.columns={given[0]}= to leave it out"
        )
    answer = content_text(row, "answer", where) if "answer" in given else records[0].answer
    return [replace(records[0], answer=answer, references=_references(row, where))]


def _gsm8k(row: dict[str, Any], where: str) -> tuple[str, str]:
    """The rationale without its calculator marks as output, and the number after ``####``."""
    rationale, separator, number = content_text(row, "answer", where).rpartition("####")
    number = number.strip().replace(",", "")
    if not separator or not number:
        raise UserError(f"{where}: answer does not end in '#### NUMBER'")
    rationale = re.sub(r"<<[^>]*>>", "", rationale).strip()
    return f"{rationale}\nThe answer is {number}." if rationale else f"The answer is {number}.", number
