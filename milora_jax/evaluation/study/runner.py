"""Runs the cells of a study in any order, and stores their results."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from milora_jax.adapters.inputs import Shape
from milora_jax.adapters.registry import adapter_shape, build_method
from milora_jax.base.hf_config import read_model_config
from milora_jax.base.source import model_directory
from milora_jax.console import Console
from milora_jax.data.sources import parse_sources
from milora_jax.errors import require
from milora_jax.evaluation.study.cells import Cell, CellRunner, Row
from milora_jax.evaluation.study.identity import study_lock
from milora_jax.evaluation.study.settings import Study
from milora_jax.evaluation.study.tuning import Chosen, choose, keys_of
from milora_jax.preemption import stop_if_preempted
from milora_jax.storage.files import write_atomic
from milora_jax.storage.lock import WorkdirBusy, WorkdirLock

ROWS_NAME = "rows.jsonl"
CELLS_NAME = "cells"
WAIT_SECONDS = 2.0
"""Seconds between two checks of cells that another process is running."""


def require_equal_budgets(study: Study, shape: Shape) -> dict[str, int]:
    """Check that every method has nearly the reference's number of tunable parameters, and return them.

    Raises:
      UserError: a method is too far from the reference's number.
    """
    counts = {
        label: build_method(settings).tunable_parameters(shape) for label, settings in study.methods.items()
    }
    budget = counts[study.reference]
    for label, count in counts.items():
        require(
            abs(count / budget - 1) <= study.tolerance,
            f"tunable parameters of study method {label!r}",
            count,
            f"within {study.tolerance:.0%} of {budget}, which {study.reference!r} has",
        )
    return counts


class StudyRunner:
    """One process that runs a study; several may share its directory."""

    def __init__(
        self, study: Study, directory: Path, console: Console, preempted: Callable[[], bool]
    ) -> None:
        self._study, self._console, self._preempted = study, console, preempted
        self._directory = directory
        self._cells = CellRunner(directory / CELLS_NAME, console.log)
        require_equal_budgets(study, adapter_shape(read_model_config(model_directory(study.base.model.path))))

    def run(self, cells: Sequence[Cell], title: str) -> None:
        """Run the cells that are not finished; wait for those that another process is running.

        Cells of one program are run one after another. If another process is running the first of them, this
        one begins with the last, so that the two rarely compile the same program.
        """
        order = {(cell.variant, cell.trained_on): i for i, cell in enumerate(cells)}
        grouped = sorted(cells, key=lambda cell: order[cell.variant, cell.trained_on])
        pending = {cell.name: cell for cell in grouped}
        unfinished = [cell for cell in pending.values() if self._cells.result(cell) is None]
        if unfinished and self._busy(unfinished[0]):
            pending = dict(reversed(pending.items()))
        with self._console.progress(title, len(pending), "cells") as bar:
            while pending:
                worked = False
                for cell in list(pending.values()):
                    try:
                        worked |= self._finish(cell)
                    except WorkdirBusy:
                        continue
                    del pending[cell.name]
                    bar.advance(1)
                if pending and not worked:
                    stop_if_preempted(self._preempted, "waiting for another process")
                    time.sleep(WAIT_SECONDS)

    def _lock(self, cell: Cell) -> WorkdirLock:
        return WorkdirLock(self._directory / CELLS_NAME / cell.name)

    def _busy(self, cell: Cell) -> bool:
        """Whether another process is running the cell."""
        try:
            with self._lock(cell):
                return False
        except WorkdirBusy:
            return True

    def _finish(self, cell: Cell) -> bool:
        """Finish the cell, and return whether it had to be run."""
        if self._cells.result(cell) is not None:
            return False
        with self._lock(cell):
            if self._cells.result(cell) is None:
                self._cells.run(cell, self._preempted)
        return True

    def choose(self, cells: Sequence[Cell]) -> Chosen:
        """Choose what cells need; they are planned with :meth:`Chosen.nothing`."""
        return choose(self._study, *keys_of(cells), self._dev_losses)

    def _dev_losses(self, groups: list[list[Cell]], title: str) -> list[float]:
        """The mean dev loss of each group of cells, in nats; infinite where a run diverged."""
        every = [cell for group in groups for cell in group]
        self.run(every, title)
        self.write_rows(every)
        return [self._mean_loss(group) for group in groups]

    def _mean_loss(self, cells: Sequence[Cell]) -> float:
        losses = []
        for cell in cells:
            perplexity = (self._cells.result(cell) or {}).get("dev_perplexity")
            losses.append(math.inf if perplexity is None else math.log(perplexity))
        return sum(losses) / len(losses)

    def rows(self, cells: Sequence[Cell]) -> list[Row]:
        """The rows of the finished cells, one per test task."""
        found = []
        for cell in cells:
            result = self._cells.result(cell)
            if result is not None:
                found.extend(_rows(cell, result))
        return found

    def scored_rows(self, cells: Sequence[Cell]) -> list[Row]:
        """:meth:`rows`, each with the scores of its test rows as ``scores``, by route."""
        return [self._cells.with_scores(row) for row in self.rows(cells)]

    def write_rows(self, cells: Sequence[Cell]) -> None:
        """Add the finished cells to ``rows.jsonl``: one line per (variant, task, seed), and per setting where
        one is being chosen; ``accuracy`` and ``loss`` are null where only dev rows were used.
        """
        path = self._directory / ROWS_NAME
        with study_lock(self._directory):
            old = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
            rows = [*map(json.loads, old), *self.rows(cells)]
            unique = {
                (row["variant"], row["trained_on"], row["task"], row["seed"], row["cell"]): row
                for row in rows
            }
            lines = [json.dumps(row) + "\n" for _, row in sorted(unique.items())]
            write_atomic(path, "".join(lines).encode())


def _rows(cell: Cell, result: Row) -> list[Row]:
    # A run that chose a learning rate has no accuracy; other runs' are in the order of the study's tasks.
    tasks = [source.name for source in parse_sources(cell.config.data.test)] if cell.scored else []
    accuracy = {task: result["accuracy"][task] for task in tasks} or {cell.trained_on: None}
    by_task = ("accuracy", "loss", "expert_share")
    shared = {name: value for name, value in result.items() if name not in by_task}
    return [
        {
            "variant": cell.variant,
            "method": cell.method,
            "task": task,
            **shared,
            "accuracy": value,
            "loss": result.get("loss", {}).get(task),
            "expert_share": result.get("expert_share", {}).get(task),
            "cell": cell.name,
        }
        for task, value in accuracy.items()
    ]
