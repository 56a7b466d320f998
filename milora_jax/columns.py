"""``data.columns``: which column of a source's rows holds which field of a record.

An entry is ``[SOURCE:]FIELD=COLUMN``, ``[SOURCE:]FIELD="a text"`` for a field that is the same text in every
row, or ``[SOURCE:]NAME=`` for a column that is left out; entries are separated by commas.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from milora_jax.errors import UserError, one_of, require

FIELDS = (
    *("instruction", "input", "output", "answer", "references", "system", "messages", "conversations"),
    "tools",
    *("prompt", "chosen", "rejected", "completion", "label", "text"),
)
"""The fields that a column may be mapped onto."""

TEXTS = ("instruction", "input", "system")
"""Fields that may be the same text in every row: they belong to the question, never to the answer."""

EXPECTED = 'entries [SOURCE:]FIELD=COLUMN, FIELD="a text" or COLUMN=, separated by commas'

_ENTRY = re.compile(
    r"""\s*(?:(?P<source>[^=,"']+):)?\s*(?P<field>[^=:,"']+?)\s*="""
    r"""\s*(?:"(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<column>[^"',][^,]*?|))\s*(?:,|$)"""
)


@dataclass(frozen=True)
class Column:
    """One entry of ``data.columns``.

    Attributes:
      source: name of the data source that the entry applies to; "" is every source.
      field: the field that the entry gives, or, where ``column`` and ``text`` are empty, the column left out.
      column: the column that holds the field.
      text: the text of the field.
      entry: the entry as it was written.
    """

    source: str
    field: str
    column: str
    text: str
    entry: str

    @property
    def omits(self) -> bool:
        """Whether the entry leaves a column out."""
        return not self.column and not self.text


def parse_columns(text: str) -> tuple[Column, ...]:
    """Parse ``data.columns``.

    Raises:
      UserError: an entry cannot be read; the error names it.

    >>> parsed = parse_columns('input=mr, e2e:instruction="Say it."')
    >>> [(column.source, column.field, column.column or column.text) for column in parsed]
    [('', 'input', 'mr'), ('e2e', 'instruction', 'Say it.')]
    """
    columns: list[Column] = []
    at = 0
    while at < len(text.rstrip()):
        match = _ENTRY.match(text, at)
        if match is None:
            raise UserError(f"data.columns {text[at:].strip()!r}: expected {EXPECTED}")
        quoted = match["double"] if match["column"] is None and match["single"] is None else match["single"]
        entry = match[0].strip().removesuffix(",").strip()
        column = Column(
            (match["source"] or "").strip(), match["field"], match["column"] or "", quoted or "", entry
        )
        if quoted is not None:
            require(bool(quoted.strip()), "data.columns", entry, "a text that is not blank")
            one_of("data.columns: the field of a text", column.field, TEXTS)
        elif column.column:
            one_of("data.columns: the field", column.field, FIELDS)
        if (column.source, column.field) in {(each.source, each.field) for each in columns}:
            raise UserError(f"data.columns {entry!r}: {column.field!r} stands there twice, expected it once")
        columns.append(column)
        at = match.end()
    return tuple(columns)


def columns_of(columns: Sequence[Column], source: str) -> tuple[Column, ...]:
    """The entries that apply to one source: its own, and general ones that its own do not replace."""
    own = [column for column in columns if column.source == source]
    fields = {column.field for column in own}
    return (*own, *(column for column in columns if not column.source and column.field not in fields))


def require_sources(columns: Sequence[Column], sources: Collection[str]) -> None:
    """Refuse an entry for a source that does not exist.

    Raises:
      UserError: it names the first such entry.
    """
    for column in columns:
        if column.source and column.source not in sources:
            known = ", ".join(sorted(set(sources))) or "no source"
            raise UserError(
                f"data.columns {column.entry!r}: there is no source {column.source!r}, expected {known}"
            )


def mapped_row(row: Mapping[str, Any], columns: Sequence[Column], where: str) -> dict[str, Any]:
    """A row whose columns have the names of the fields that they hold.

    A column that is mapped or left out loses its own name; every other column keeps it. A row that lacks the
    column but has the field needs no mapping, so a file in the schema of records can replace a data set whose
    columns have other names.

    Args:
      columns: the entries that apply to the row's source.
      where: file and line, for errors.

    Raises:
      UserError: the row has neither a column nor its field; the error names the column.
    """
    columns = [each for each in columns if not each.column or each.column in row or not _has(row, each.field)]
    for each in columns:
        if each.column and each.column not in row:
            has = ", ".join(map(repr, row)) or "no columns"
            raise UserError(
                f"{where}: there is no column {each.column!r} as in data.columns {each.entry!r}, "
                f"the row has {has}"
            )
    gone = {each.field if each.omits else each.column for each in columns}
    kept = {name: value for name, value in row.items() if name not in gone}
    given = {each.field: row[each.column] if each.column else each.text for each in columns if not each.omits}
    return {**kept, **given}


def _has(row: Mapping[str, Any], field: str) -> bool:
    """Whether a row has the field already; one output is enough for ``references``."""
    return field in row or (field == "references" and "output" in row)
