"""A predictions file that grows batch by batch and is resumed by the same command.

``NAME.result.json`` beside ``NAME.jsonl`` holds the settings of the predictions and at the end the result.
Rows are appended batch by batch, in an order that depends only on the settings, so that an interrupted
evaluation computes the same batches as an undisturbed one. When all rows are present, the file is sorted by
row.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from milora_jax.errors import UserError
from milora_jax.evaluation.score import Prediction, TaskScore, prediction_line, write_predictions
from milora_jax.parallel.processes import by_dotted_name, from_first, is_first
from milora_jax.storage.files import read_json, write_json_atomic

FIELDS = {field.name for field in fields(Prediction)}
NOT_ALWAYS = {"references"}
"""Optional fields of a line."""

AGAIN = "give --fresh to begin again, or another --predictions FILE"


class TaskBatch(NamedTuple):
    """Rows of one task that are answered together."""

    task: str
    rows: tuple[int, ...]


def batches_by_length(task: str, lengths: Sequence[int], size: int) -> list[TaskBatch]:
    """Group all rows of a task by length, the shortest first.

    >>> batches_by_length("sums", [5, 9, 2], 2)
    [TaskBatch(task='sums', rows=(2, 0)), TaskBatch(task='sums', rows=(1,))]
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [TaskBatch(task, tuple(order[start : start + size])) for start in range(0, len(order), size)]


def result_path(path: Path) -> Path:
    """The path of the settings and the result of a predictions file."""
    return path.with_name(f"{path.stem}.result.json")


class PredictionFile:
    """Predictions on the disk, locked by one process for the ``with`` block.

    Of several processes that answer together only the first has the file; the others learn from it which
    batches are missing, and write nothing.

    Attributes:
      done: predictions that were present when it was opened, and those appended since.
      result: result of an earlier evaluation with the same settings; None if there is none.
      missing: the batches that were not answered when it was opened.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, Any], batches: Sequence[TaskBatch], fresh: bool
    ) -> None:
        """Set up the file without opening it.

        Args:
          settings: everything that the predictions depend on, as JSON.
          batches: all rows in the order in which they are answered.
          fresh: begin again, whatever the file holds.
        """
        self.path, self._settings, self._fresh = path, dict(settings), fresh
        self._batches = list(batches)
        self._file: Any = None
        self.done: dict[tuple[str, int], Prediction] = {}
        self.result: dict[str, Any] | None = None
        self.missing: list[TaskBatch] = []

    def __enter__(self) -> PredictionFile:
        """Open the file and drop an incomplete batch that a kill left.

        Raises:
          UserError: another process has it open, or its predictions have other settings or other rows.
        """
        if is_first():
            self._file = open(self.path, "a+b")
            try:
                self._hold()
                self._take_up()
            except BaseException:
                self._file.close()
                raise
        left = [b for b in self._batches if any((b.task, row) not in self.done for row in b.rows)]
        # The batches are answered in their order, so their number says which are left.
        self.missing = self._batches[len(self._batches) - from_first(len(left)) :]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, predictions: Sequence[Prediction]) -> None:
        """Add the predictions of a batch; they are on the disk when this returns."""
        if self._file is None:
            return
        self._file.write("".join(prediction_line(each) + "\n" for each in predictions).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done.update({(each.task, each.row): each for each in predictions})

    def scores(self) -> list[TaskScore]:
        """The score of every task, with rows in order."""
        tasks = dict.fromkeys(batch.task for batch in self._batches)
        return [
            TaskScore(task, [self.done[key] for key in sorted(self.done) if key[0] == task]) for task in tasks
        ]

    def finish(self, result: Mapping[str, Any]) -> None:
        """Sort the rows and write the result beside them."""
        write_predictions(self.path, self.scores())
        write_json_atomic(result_path(self.path), {"settings": self._settings, "result": dict(result)})

    def _hold(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path} is being written by another evaluation") from None

    def _take_up(self) -> None:
        if self._fresh:
            self._file.truncate(0)
        self._file.seek(0)
        content, kept = self._file.read(), 0
        if b"\n" in content:  # a file without a whole line has no settings yet
            self._require_same_settings()
        for batch, size in self._whole_batches(content):
            self.done.update({(each.task, each.row): each for each in batch})
            kept += size
        self._file.truncate(kept)
        if not self.done:
            write_json_atomic(result_path(self.path), {"settings": self._settings, "result": None})

    def _whole_batches(self, content: bytes) -> Iterator[tuple[list[Prediction], int]]:
        """The predictions of every complete batch, and their bytes."""
        *lines, _ = content.split(b"\n")  # a torn line has no end
        found = [self._parse(line, number) for number, line in enumerate(lines, 1)]
        sizes = [len(line) + 1 for line in lines]
        keys = [(each.task, each.row) for each in found]
        every = [(batch.task, row) for batch in self._batches for row in batch.rows]
        if sorted(keys) == sorted(every):
            yield found, sum(sizes)
            return
        if keys != every[: len(keys)]:
            raise UserError(f"{self.path} holds other rows than this command has written: {AGAIN}")
        start = 0
        for batch in self._batches:
            end = start + len(batch.rows)
            if end > len(found):
                return
            yield found[start:end], sum(sizes[start:end])
            start = end

    def _parse(self, line: bytes, number: int) -> Prediction:
        try:
            values = json.loads(line)
        except ValueError:
            values = None
        if not isinstance(values, dict) or not FIELDS - NOT_ALWAYS <= values.keys() <= FIELDS:
            raise UserError(f"{self.path}:{number}: not a prediction of this version: {AGAIN}")
        return Prediction(**values)

    def _require_same_settings(self) -> None:
        beside = result_path(self.path)
        if not beside.is_file():
            raise UserError(
                f"{self.path} is there without {beside.name}, so its settings are unknown: {AGAIN}"
            )
        read = read_json(beside)
        before = read.get("settings") if isinstance(read, dict) else None
        if before == self._settings:
            self.result = read.get("result")
            return
        old, new = by_dotted_name(before), by_dotted_name(self._settings)
        name = next(key for key in {**new, **old} if old.get(key) != new.get(key))
        raise UserError(
            f"{self.path} was made with {name} {_said(old.get(name))}, this command has "
            f"{_said(new.get(name))}: {AGAIN}"
        )


def _said(value: Any) -> str:
    """A setting as text for people; hashes are shortened."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[1:13]}..."
