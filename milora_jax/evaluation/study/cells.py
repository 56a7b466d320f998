"""One cell of a study: one method, one set of training rows, one seed, trained and scored."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from milora_jax.adapters.registry import adapter_shape, build_method, full_settings
from milora_jax.base.modules import Base
from milora_jax.config import AdapterSection, Config
from milora_jax.errors import NonFiniteError, UserError
from milora_jax.evaluation.final import for_decoding, parameter_counts, score_tests
from milora_jax.evaluation.score import limited
from milora_jax.evaluation.study.forced import FORCED, forced_scores
from milora_jax.evaluation.study.identity import changed_settings
from milora_jax.evaluation.study.rows import ROUTED, Encoded, read_scores, with_answers, write_scores
from milora_jax.evaluation.study.settings import MIXED, Converged, Study
from milora_jax.evaluation.study.starts import START, with_fixed_mask
from milora_jax.preemption import stop_if_preempted
from milora_jax.storage.adapters import best_metadata, load_adapter
from milora_jax.storage.files import read_json, write_json_atomic
from milora_jax.training.health import BLIND
from milora_jax.training.loop import Trainer, planned_steps
from milora_jax.training.prepare import Run, prepare_run, with_rows
from milora_jax.training.step import Steps, make_steps
from milora_jax.training.workdir import METRICS_NAME, claim_workdir

RESULT = "result.json"
LOG = "log.txt"
"""Log of a run; the logs of a thousand runs would be too much for one terminal."""

MAPS = Path("/proc/self/maps")
MOST_MAPS = 30_000
"""Most memory maps before compiled programs are dropped. A program has some hundred maps, and Linux allows a
process 65,530 by default; at the limit XLA aborts with "Unable to allocate section memory"."""

Row = dict[str, Any]
"""A finished cell on one task: one line of ``rows.jsonl``."""


@dataclass(frozen=True)
class Cell:
    """A run that is trained and scored once.

    Attributes:
      variant: name in tables and plots: a method's label, or the subject's with the changed setting.
      method: the label whose learning rate it uses.
      trained_on: a task, or ``mixed``.
      config: the config of the run.
      scored: whether the test rows are scored; runs that choose a learning rate use dev rows only.
      converged: whether it has a budget of ``Study.converged``.
      forced: whether the test rows are also scored under routes other than the routers'.
      forced_rows: see ``Study.forced_rows``.
      fixed_mask: whether every layer has one random set of experts for all prompts, see ``starts``.
      generate: whether the test rows are answered by generation, see ``Study.generate``.
    """

    variant: str
    method: str
    trained_on: str
    config: Config
    scored: bool = True
    converged: bool = False
    forced: bool = False
    fixed_mask: bool = False
    generate: bool = True
    forced_rows: int = 0

    @property
    def seed(self) -> int:
        """Seed of initialisation and row order; a seed gives every method the same rows."""
        return self.config.train.seed

    @property
    def name(self) -> str:
        """Folder of the cell, the same for the same run in every table.

        Settings at their defaults are not part of it, so that a new setting renames no cell; paths of base
        and rows are not either. The study's claim checks that all of them are the study's.
        """
        flags = [self.scored, self.forced, self.fixed_mask, self.generate]
        values = json.dumps([changed_settings(self.config), self.trained_on, *flags], sort_keys=True)
        digest = hashlib.sha256(values.encode()).hexdigest()[:10]
        return f"{self.config.adapter.method}-{self.trained_on}-s{self.seed}-{digest}"


def make_cell(
    study: Study,
    variant: str,
    method: str,
    settings: AdapterSection,
    trained_on: str,
    seed: int,
    learning_rate: float,
    *,
    scored: bool = True,
    router_rate: float = 1.0,
    converged: Converged | None = None,
    forced: bool = False,
    fixed_mask: bool = False,
) -> Cell:
    """Make a cell of a study; its settings are written out, so that equal runs have equal names.

    Args:
      converged: the terms of its budget; None for the short one.
    """
    steps = study.mixed_steps if trained_on == MIXED and study.mixed_steps else study.base.train.max_steps
    train = dataclasses.replace(
        study.base.train,
        coefficient_every=study.coefficient_every.get(method, study.base.train.coefficient_every),
        learning_rate=learning_rate,
        coefficient_learning_rate=study.coefficient_ratio * learning_rate,
        router_rate=router_rate,
        seed=seed,
        max_steps=steps,
    )
    if converged is not None:
        train = converged.budget(trained_on).applied(train)
    config = dataclasses.replace(
        study.base,
        adapter=full_settings(build_method(settings)),
        data=study.data_of(trained_on),
        train=train,
    )
    return Cell(
        variant,
        method,
        trained_on,
        config,
        scored,
        converged is not None,
        forced,
        fixed_mask,
        study.generate,
        study.forced_rows,
    )


def memory_maps() -> int:
    """Number of memory maps of this process; 0 where the system does not report it."""
    try:
        return MAPS.read_bytes().count(b"\n")
    except OSError:
        return 0


class CellRunner:
    """Runs cells on one base, and keeps its leaves, rows and compiled programs between them."""

    def __init__(self, root: Path, log: Callable[[str], None]) -> None:
        self._root, self._log = root, log
        self._runs: dict[str, Run] = {}
        self._steps: dict[tuple, Steps] = {}
        self._decoding: Base | None = None

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """The result of a finished cell, or None."""
        path = self._root / cell.name / RESULT
        return read_json(path) if path.is_file() else None

    def with_scores(self, row: Row) -> Row:
        """Add the scores of its test rows, by route, to the row of a finished cell that has them."""
        path, task = self._root / row["cell"], row["task"]
        if row["accuracy"] is None:
            return row
        return {**row, "scores": {route: tasks[task] for route, tasks in read_scores(path).items()}}

    def run(self, cell: Cell, preempted: Callable[[], bool]) -> None:
        """Train (or resume), score, write the result, and delete the checkpoints.

        A run whose loss does not stay finite has a result too: it is written as diverged.
        """
        started, workdir = time.monotonic(), self._root / cell.name
        self._make_room()
        run = self._prepare(cell)
        claim_workdir(workdir, run.config)
        if cell.fixed_mask:
            run = with_fixed_mask(run, workdir / START, self._log)
        method, shape = build_method(run.config.adapter), adapter_shape(run.model)
        found: dict[str, Any] = {
            "trained_on": cell.trained_on,
            "seed": cell.seed,
            "learning_rate": cell.config.train.learning_rate,
            "adapter": dataclasses.asdict(cell.config.adapter),
            "tunable_parameters": method.tunable_parameters(shape),
            "base_fingerprint": run.base_fingerprint,
            "data_fingerprint": run.data_fingerprint,
        }

        def log(line: str) -> None:
            with (workdir / LOG).open("a", encoding="utf-8") as file:
                file.write(line + "\n")

        trainer = Trainer(run, workdir, log, self._programs(run))
        try:
            fit = trainer.fit(lambda step, status: None, preempted)
        except NonFiniteError as error:
            found |= {"diverged": str(error), "dev_perplexity": None, **self._nothing(cell, run, workdir)}
        else:
            counts = parameter_counts(method, shape, best_metadata(workdir))
            found |= {
                "tunable_parameters": counts.tunable,
                "active_parameters": counts.active,
                "steps": fit.steps,
                "best_step": fit.progress.best_step,
                "stopped_early": fit.progress.stopped,
                "dev_perplexity": fit.progress.best_perplexity,
                "routing": routing_of(workdir, fit.progress.best_step),
                **(self._score(cell, run, workdir, preempted) if cell.scored else {"accuracy": {}}),
            }
        write_json_atomic(workdir / RESULT, {**found, "seconds": time.monotonic() - started})
        for name in ("checkpoints", "best", START):
            shutil.rmtree(workdir / name, ignore_errors=True)

    def _make_room(self) -> None:
        """Drop compiled programs before they are too many for one process."""
        if memory_maps() > MOST_MAPS:
            self._steps.clear()
            jax.clear_caches()
            gc.collect()

    def _prepare(self, cell: Cell) -> Run:
        """Prepare the run of a cell: rows are read once per set, the base once per study."""
        if cell.trained_on not in self._runs:
            if self._runs:
                other = next(iter(self._runs.values()))
                self._runs[cell.trained_on] = with_rows(other, cell.config, self._log)
            else:
                self._runs[cell.trained_on] = prepare_run(cell.config, None, self._log)
            for task, records in self._runs[cell.trained_on].tests.items():
                if not records[0].answered:
                    raise UserError(f"study base.data.test: the rows of {task!r} have no answers to compare")
        return dataclasses.replace(self._runs[cell.trained_on], config=cell.config)

    def _programs(self, run: Run) -> Steps:
        """The compiled steps; methods, seeds and learning rates are their arguments."""
        settings = dataclasses.replace(
            run.config.train, seed=0, learning_rate=1.0, coefficient_learning_rate=1.0
        )
        total = planned_steps(settings, len(run.train))
        key = settings, total
        if key not in self._steps:
            self._steps[key] = make_steps(run.model, settings, total)
        return self._steps[key]

    def _score(self, cell: Cell, run: Run, workdir: Path, preempted: Callable[[], bool]) -> dict[str, Any]:
        """Accuracy, loss and expert shares of the best adapter on disk, by test task; the scores of each row
        go to a file of their own."""
        if self._decoding is None:
            self._decoding = run.decoding_base()
        base, stored = self._decoding, load_adapter(workdir)
        adapter, rows = for_decoding(base, stored), encoded_tests(run)

        def advance(rows: int) -> None:
            stop_if_preempted(preempted, "scoring a cell")

        routed = {task: each.scores(run, base, adapter, None, advance) for task, each in rows.items()}
        answers = []
        if cell.generate:
            answers = score_tests(run, base, stored, advance)
            routed |= {score.task: with_answers(routed[score.task], score) for score in answers}
        else:
            routed = {task: dataclasses.replace(s, correct=s.exact) for task, s in routed.items()}
        forced = {}
        if cell.forced:
            forced = forced_scores(run, base, adapter, encoded_tests(run, cell.forced_rows), advance)
        write_scores(workdir, {ROUTED: routed, **forced})
        return {
            "accuracy": {task: each.accuracy for task, each in routed.items()},
            "loss": {task: each.loss for task, each in routed.items()},
            "expert_share": {
                s.task: s.expert_share.round(4).tolist() for s in answers if s.expert_share is not None
            },
        }

    def _nothing(self, cell: Cell, run: Run, workdir: Path) -> dict[str, Any]:
        """The result of a run that diverged, in the form of :meth:`_score`."""
        if not cell.scored:
            return {"accuracy": {}}
        nothing = {task: each.nothing() for task, each in encoded_tests(run).items()}
        fewer = {task: each.first(cell.forced_rows) for task, each in nothing.items()}
        write_scores(workdir, {ROUTED: nothing, **(dict.fromkeys(FORCED, fewer) if cell.forced else {})})
        return {"accuracy": dict.fromkeys(nothing, 0.0), "loss": dict.fromkeys(nothing)}


def encoded_tests(run: Run, most: int = 0) -> dict[str, Encoded]:
    """Encode the test rows to score, by task.

    Args:
      most: rows of each task, from the first; 0 is all of them.
    """
    limit = run.config.eval.limit
    return {task: Encoded(run, limited(limited(records, limit), most)) for task, records in run.tests.items()}


def routing_of(workdir: Path, step: int) -> dict[str, float] | None:
    """How the dev prompts were routed at one evaluation, in a few numbers; None without a router.

    ``common``, ``agree``, ``across``, ``pooler_share`` and ``spread`` are means over the layers of the
    figures of ``training.health``, and ``largest`` is the largest over layers; ``blind`` is the share of
    layers whose router is blind.
    """
    lines = (workdir / METRICS_NAME).read_text(encoding="utf-8").splitlines()
    metrics = [
        found for found in map(json.loads, lines) if found["step"] == step and found.get("route_common")
    ]
    if not metrics:
        return None
    last = metrics[-1]
    names = {"common": "route_common", "agree": "route_agree", "across": "route_across"}
    names |= {"pooler_share": "pooler_share", "spread": "feature_spread"}
    means = {short: float(np.mean(last[name])) for short, name in names.items() if last[name] is not None}
    blind = float(np.mean(np.array(last["route_common"]) >= BLIND))
    return {**means, "largest": max(last["router_input_max"]), "blind": blind}
