"""Rows to be scored that are questions without answers, of which there are predictions only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from milora_jax.data.conversations import FORMS, head_of, is_given

ANSWER_FIELDS = ("output", "answer", "references")
QUESTION_FIELDS = {"instruction", "input", "question", "system", "history", "tools"}
"""Fields of plain rows."""


def asks_only(row: Mapping[str, Any], where: str) -> bool:
    """Whether a row is a question without any answer: a chat that ends with a message of the user or
    of a tool, or a plain row whose answer is there and empty, or that has no other fields at all.

    A row with fields of other names may have its answer in one of them.
    """
    if any(is_given(row.get(name)) for name in ANSWER_FIELDS):
        return False
    if (head := head_of(row, where)) in FORMS:
        form, listed = FORMS[head], row[head]
        last = listed[-1] if isinstance(listed, list) and listed else None
        return isinstance(last, dict) and form.roles.get(str(last.get(form.role))) in ("user", "tool")
    named = any(name in row for name in ANSWER_FIELDS)
    return head is not None and (named or row.keys() <= QUESTION_FIELDS)
