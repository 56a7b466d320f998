"""Records from files and from the Hub, in three schemas, and the errors they can have.

Alpaca and LLM-Adapters: ``instruction``, ``input``, ``output``, ``answer``; ``answer`` may be missing and
is then the output. GSM8K: ``question`` and ``answer``, a rationale that ends in ``#### N``.
Chats, ``messages`` or ``conversations``: see ``data.conversations``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from milora_jax.data.chat import Message
from milora_jax.data.conversations import chat_field, content_text, read_chat
from milora_jax.errors import UserError

SPLIT_STEMS = ("train", "dev", "test", "validation", "valid")
HOLDOUT_STREAM = 1
"""Keeps the held-out choice apart from every other use of the run's seed."""


@dataclass(frozen=True)
class Record:
    """What is asked, what should be written, and the short answer that is scored.

    A record has one prompt, because a route belongs to one prompt: a chat gives a record for each of the
    assistant's turns.

    Attributes:
      instruction: of a chat, the user's last message.
      messages: all of the chat that comes before ``output``; empty where the row is no chat.
      references: texts that are each a right answer, for the measures of free text; empty where the row
        lists none, and ``output`` is the only one.
      where: file and line of the row, for errors; no part of what the record says.
    """

    instruction: str
    input: str
    output: str
    answer: str
    messages: tuple[Message, ...] = ()
    references: tuple[str, ...] = ()
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class Source:
    """Where records come from: a file, or ``hf:NAME[:CONFIG[:SPLIT]]``; and the task's name."""

    name: str
    location: str


def parse_sources(text: str) -> list[Source]:
    """Split comma-separated ``[NAME=]SOURCE``.

    The default name is the file's stem, or its folder's name where the stem only says which split it
    is; for the Hub it is the last part of the data set's name.

    >>> [source.name for source in parse_sources("data/gsm8k/test.jsonl,mine=rows.json")]
    ['gsm8k', 'mine']
    """
    sources = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, separator, location = entry.partition("=")
        if not separator or "/" in name:  # a path such as data/run=3/train.jsonl holds no name
            name, location = _default_name(entry), entry
        if not name or not location:
            raise UserError(f"data source {entry!r}: expected [NAME=]SOURCE")
        if name in {source.name for source in sources}:
            raise UserError(f"data source {entry!r}: the name {name!r} is used twice, write NAME=SOURCE")
        sources.append(Source(name, location))
    return sources


def _default_name(location: str) -> str:
    if location.startswith("hf:"):
        return location.split(":")[1].split("/")[-1]
    path = Path(location)
    return path.parent.name or path.stem if path.stem in SPLIT_STEMS else path.stem


def read_records(source: Source, scored: bool = False) -> list[Record]:
    """All records of a source.

    Args:
      scored: the rows are asked and scored, not trained on: ``output`` may be empty where ``answer``
        is given, as it is in a row of LLM-Adapters' GSM8K test file.

    Raises:
      UserError: naming the file and line of the first row that is malformed or incomplete.
    """
    if source.location.startswith("hf:"):
        rows = _hub_rows(source.location)
    else:
        path = Path(source.location)
        if not path.is_file():
            raise UserError(
                f"{path}: {'a directory' if path.is_dir() else 'no such file'}, expected JSON or JSONL"
            )
        if path.suffix == ".jsonl":
            rows = _jsonl_rows(path)
        elif path.suffix == ".json":
            rows = _json_rows(path)
        else:
            raise UserError(f"{path}: suffix {path.suffix!r}: expected .json or .jsonl")
    records = [replace(record, where=where) for row, where in rows for record in _records(row, where, scored)]
    if not records:
        raise UserError(f"{source.location}: the data set is empty")
    return records


def holdout(
    records: list[Record], share: float, seed: int, limit: int = 0
) -> tuple[list[Record], list[Record]]:
    """Split off dev records: a pure function of the records and the seed.

    The turns of a chat stay together: the prompt of a later one holds the answer of an earlier one.

    Args:
      share: of the rows; at least one is held out, and one is left.
      limit: most rows that are held out; 0 means as many as ``share`` gives.

    Returns:
      Training records in their order, and at least one dev record.
    """
    rows = _by_row(records)
    if len(rows) < 2:
        raise UserError("one training row is too few to hold out dev rows: give data.dev")
    count = min(max(1, round(share * len(rows))), len(rows) - 1, limit or len(rows))
    order = np.random.default_rng([seed, HOLDOUT_STREAM]).permutation(len(rows))
    held = set(order[:count].tolist())
    train = [record for i, row in enumerate(rows) if i not in held for record in row]
    return train, [record for i in sorted(held) for record in rows[i]]


def first_rows(records: list[Record], limit: int) -> list[Record]:
    """The first ``limit`` rows, a chat with all of its turns; all of them where it is 0."""
    return [record for row in _by_row(records)[:limit] for record in row] if limit else records


def _by_row(records: list[Record]) -> list[list[Record]]:
    """Records that are turns of one chat, together; each of the others alone."""
    rows: list[list[Record]] = []
    for record in records:
        before = rows[-1][-1] if rows else None
        said = (*before.messages, Message("assistant", before.output)) if before and before.messages else ()
        if said and record.messages[: len(said)] == said:
            rows[-1].append(record)
        else:
            rows.append([record])
    return rows


def fingerprint(records: list[Record], template: str = "") -> str:
    """SHA-256 over the records in their order.

    Args:
      template: the program text of the chat template that they are written with.
    """
    digest = hashlib.sha256(template.encode())
    for record in records:
        values = asdict(record)
        del values["where"]
        for name in ("messages", "references"):
            if not values[name]:
                del values[name]  # a run whose records had no such field can be continued
        digest.update(json.dumps(values, sort_keys=True).encode())
    return digest.hexdigest()


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror})") from None


def _jsonl_rows(path: Path) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            yield _parse(line, f"{path}:{number}"), f"{path}:{number}"


def _json_rows(path: Path) -> Iterator[tuple[Any, str]]:
    text = _read_text(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # integers of thousands of digits, hostile nesting
        raise UserError(f"{path}: not JSON that can be read ({error})") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a JSON list of records")
    lines = _row_lines(text)
    for number, row in enumerate(rows, 1):
        line = f":{lines[number - 1]}" if number <= len(lines) else ""
        yield row, f"{path}{line} (row {number})"


def _row_lines(text: str) -> list[int]:
    """The line on which each element of a JSON list begins."""
    decoder, lines, at = json.JSONDecoder(), [], text.index("[") + 1
    line, counted = 1, 0
    skip = re.compile(r"[\s,]*")
    while True:
        between = skip.match(text, at)
        at = between.end() if between else at
        if at >= len(text) or text[at] == "]":
            return lines
        line, counted = line + text.count("\n", counted, at), at
        lines.append(line)
        _, at = decoder.raw_decode(text, at)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON that can be read ({error})") from None


def _hub_rows(location: str) -> Iterator[tuple[Any, str]]:
    parts = location.split(":")[1:]
    if not parts[0] or len(parts) > 3:
        raise UserError(f"data source {location!r}: expected hf:NAME[:CONFIG[:SPLIT]]")
    name, config, split = (*parts, *("", "")[: 3 - len(parts)])[:3]
    for number, row in enumerate(hub_rows(name, config, split or "train"), 1):
        yield row, f"{location} (row {number})"


def hub_rows(name: str, config: str, split: str) -> Iterable[Any]:
    """The rows of a Hub data set as they are.

    Args:
      config: "" is the data set's only one.

    Raises:
      UserError: there is no package ``datasets``, no network, or no such data set.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"data set {name!r} needs the package datasets: pip install datasets") from None
    # It retries for half a minute and logs each time; one line says as much.
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return load_dataset(name, config or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"data set {name!r} cannot be loaded from the Hub: {reason}") from None
    finally:
        logger.setLevel(level)


def _records(row: Any, where: str, scored: bool) -> list[Record]:
    """The records of one row of any schema."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, found {type(row).__name__}")
    if (field := chat_field(row)) is not None:
        if "instruction" in row:
            raise UserError(f"{where}: the row holds 'instruction' and {field!r}, expected one of them")
        return _turns(read_chat(row, where))
    if "question" in row and "instruction" not in row:
        return [_gsm8k(row, where)]
    output = content_text(row, "output", where, required=not (scored and "answer" in row))
    answer = content_text(row, "answer", where) if "answer" in row else output.strip()
    given = content_text(row, "input", where, required=False)
    return [Record(content_text(row, "instruction", where), given, output, answer)]


def _turns(messages: tuple[Message, ...]) -> list[Record]:
    """A record for each turn of the assistant."""
    return [
        Record(messages[i - 1].content, "", message.content, message.content.strip(), messages[:i])
        for i, message in enumerate(messages)
        if message.role == "assistant"
    ]


def _gsm8k(row: dict[str, Any], where: str) -> Record:
    """The rationale without its calculator marks, and the number after ``####``."""
    rationale, separator, number = content_text(row, "answer", where).rpartition("####")
    number = number.strip().replace(",", "")
    if not separator or not number:
        raise UserError(f"{where}: answer does not end in '#### NUMBER'")
    rationale = re.sub(r"<<[^>]*>>", "", rationale).strip()
    output = f"{rationale}\nThe answer is {number}." if rationale else f"The answer is {number}."
    return Record(content_text(row, "question", where), "", output, number)
