"""A measure of the user's own, ``eval.metric=FILE.py:FUNCTION``.

The function is called once for each task, with the generated texts and the rows that were asked::

    def metric(predictions: list[str], rows: list[dict]) -> float | list[float]: ...

It returns a number for the task, or a number for each row, of which the mean is reported. A row has
``instruction``, ``input``, ``output``, ``answer``, ``references`` and ``messages``, and ``tools`` where its
chat offers some; docs/evaluation.md.
"""

from __future__ import annotations

import hashlib
import math
import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from milora_jax.config import split_metric
from milora_jax.config_file import place_in
from milora_jax.data.chat import Message
from milora_jax.data.records import Record
from milora_jax.errors import UserError


@dataclass(frozen=True)
class OwnMetric:
    """A function that measures the answers to a task.

    Attributes:
      given: FILE.py:FUNCTION.
      digest: SHA-256 of the file.
    """

    given: str
    digest: str
    function: Callable[[list[str], list[dict[str, Any]]], Any]

    @property
    def path(self) -> Path:
        """The path of the file."""
        return split_metric(self.given)[0]

    def value(self, task: str, predictions: Sequence[str], records: Sequence[Record]) -> float:
        """Measure the answers to a task.

        Args:
          predictions: the generated texts.
          records: what was asked, one for each of them.

        Raises:
          UserError: the function raises, or returns something else than finite numbers; the error names the
            file and line of the function, and the row where it is known.
        """
        try:
            found = self.function(list(predictions), [row_of(record) for record in records])
            # What a function returns may be an array of any library, and lazy.
            numbers = np.asarray(found, dtype=np.float64)
        except Exception as error:  # the file is the user's code, which may raise anything
            place, what = place_in(self.path, error), f"{type(error).__name__}: {error}"
            raise UserError(f"eval.metric: {place}: task {task!r}: {what}") from None
        if numbers.shape not in ((), (len(records),)):
            raise UserError(
                f"eval.metric: {self.given} gives {list(numbers.shape)} numbers for task {task!r}: expected "
                f"one, or one for each of its {len(records)} rows"
            )
        for row, number in enumerate(numbers.reshape(-1).tolist()):
            if not math.isfinite(number):
                of_row = f"{records[row].where or f'row {row}'} of " if numbers.shape else ""
                raise UserError(
                    f"eval.metric: {self.given} gives {number} for {of_row}task {task!r}: expected a finite "
                    "number"
                )
        return math.fsum(numbers.reshape(-1).tolist()) / max(numbers.size, 1)


def read_metric(given: str) -> OwnMetric | None:
    """Load the function of ``FILE.py:FUNCTION``; None for "".

    Raises:
      UserError: there is no such file or function, or the file raises an error; the error names the line.
    """
    if not given:
        return None
    path, name = split_metric(given)
    if not path.is_file():
        raise UserError(f"eval.metric {given!r}: no such file as {str(path)!r}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        function = runpy.run_path(str(path)).get(name)
    except Exception as error:  # the file is the user's code, which may raise anything
        raise UserError(f"eval.metric: {place_in(path, error)}: {type(error).__name__}: {error}") from None
    if not callable(function):
        raise UserError(f"eval.metric {given!r}: {path} has no function {name!r}")
    return OwnMetric(given, digest, function)


def row_of(record: Record) -> dict[str, Any]:
    """A record as the function gets it."""
    return {
        "instruction": record.instruction,
        "input": record.input,
        "output": record.output,
        "answer": record.answer,
        "references": list(record.references),
        "messages": [_message_of(message) for message in record.messages],
        **({"tools": list(record.tools)} if record.tools else {}),
    }


def _message_of(message: Message) -> dict[str, Any]:
    calls = {"tool_calls": list(message.tool_calls)} if message.tool_calls else {}
    return {"role": message.role, "content": message.content, **calls}
