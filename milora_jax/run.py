"""A whole run: read, score the base, train, score the best adapter, report.

:func:`train` is what ``train.py`` calls, for notebooks, sweeps and other programs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from milora_jax.addresses import in_bucket
from milora_jax.cluster import Cluster
from milora_jax.config import Config
from milora_jax.console import Console
from milora_jax.errors import UserError, exit_report
from milora_jax.evaluation.dev_answers import scored_answers
from milora_jax.evaluation.final import (
    PREDICTIONS_NAME,
    check_tests,
    evaluate_adapter,
    evaluate_base,
    require_learned,
    write_report,
)
from milora_jax.evaluation.own_metric import read_metric
from milora_jax.evaluation.score import TaskScore, accuracies
from milora_jax.parallel.processes import is_first, together, watch_for_preemption_of_any
from milora_jax.storage.mirror import opened_workdir
from milora_jax.training.loop import Trainer
from milora_jax.training.prepare import prepare_run
from milora_jax.training.workdir import METRICS_NAME, claimed


@dataclass(frozen=True)
class TrainResult:
    """What a finished run has written.

    Attributes:
      workdir: the folder of the run, or its address in a bucket. ``load_adapter`` and the options
        ``--workdir`` and ``--adapter`` take it, and read the best adapter there.
      config: the settings of the run, with every setting of the method written out.
      steps: optimiser steps of the whole run.
      best_step: the step of the best adapter.
      scores: the scores of the best adapter, one for each task of ``data.test``, with all predictions.
      summary: the content of ``summary.json``; empty in the processes of a cluster that do not write it.
    """

    workdir: Path | str
    config: Config
    steps: int
    best_step: int
    scores: tuple[TaskScore, ...] = field(repr=False)
    summary: dict[str, Any] = field(repr=False)

    @property
    def accuracy(self) -> dict[str, float]:
        """Share of right answers of the best adapter, 0 to 1, by task, and their ``mean``; empty without
        test rows."""
        return accuracies(self.scores) if self.scores else {}

    @property
    def adapter(self) -> Path | str:
        """The folder of the best adapter, of which a copy is an adapter as well."""
        return self._within("best")

    @property
    def metrics(self) -> Path | str:
        """The file with one line of JSON per logged step or dev evaluation."""
        return self._within(METRICS_NAME)

    @property
    def predictions(self) -> Path | str | None:
        """The file with one line of JSON per scored row; None without test rows."""
        return self._within(PREDICTIONS_NAME) if self.scores else None

    def _within(self, name: str) -> Path | str:
        return f"{self.workdir}/{name}" if isinstance(self.workdir, str) else self.workdir / name


def train(
    config: Config | Mapping[str, Any],
    workdir: str | Path,
    *,
    stop: Callable[[], bool] | None = None,
    handle_signals: bool = False,
    quiet: bool = False,
    cluster: Cluster | None = None,
) -> TrainResult:
    """Train an adapter as ``train.py`` does: score the base, train, score the best adapter, report.

    Everything is written under the workdir. A run that was stopped or killed is resumed by the same call, and
    one that has ended reports its result again. Nothing of a call is left in the process but compiled
    programs, so that there may be many, one after the other.

    No handler of a signal is installed unless ``handle_signals`` asks for it. Without one, Ctrl-C raises
    KeyboardInterrupt where the program is, and the next call resumes at the newest checkpoint, as after a
    kill.

    Args:
      config: all settings, or those that are not the defaults as nested mappings, such as
        ``{"model": {"path": "hf://OWNER/NAME"}, "train": {"max_steps": 100}}``.
      workdir: the folder of the run, or ``gs://BUCKET/PATH``.
      stop: asked after every step and every batch of answers, in the thread of the call; where it returns
        True, the state is saved and the call ends with :class:`~milora_jax.errors.Preempted`. In several
        processes it must return the same in all.
      handle_signals: let SIGTERM and a first Ctrl-C do what ``stop`` does, until the call ends. Only the main
        thread can.
      quiet: print nothing. Otherwise the report is printed, and progress goes to standard error.
      cluster: join the processes that it or the environment names for the time of the call, as ``train.py``
        does. JAX must not have been used before, and a failure ends the process, since the others would wait
        for it. None: this process is alone, or has joined them itself.

    Raises:
      UserError: something is wrong with a setting or a file, in the line that ``train.py`` prints after
        ``error:``, and ``exit_code`` is the code with which it ends: 2 for bad input or a workdir of another
        run; Preempted, 75; TemporaryError, 75, for a bucket that is out of reach; NonFiniteError, 3; and
        NothingLearnedError, 4, for a run that has written all of its results.
    """
    started = time.monotonic()
    with _refusals_in_one_line():
        settings = config if isinstance(config, Config) else Config.from_dict(config)
        metric = read_metric(settings.eval.metric)  # once: base and adapter are measured alike
        # JAX installs its handler of SIGTERM when it joins others: several keep it, and ours replaces it
        # for one.
        with (
            nullcontext() if cluster is None else together(cluster),
            _stopping(stop, handle_signals) as preempted,
            opened_workdir(workdir, Console(silent=quiet).log, preempted) as (folder, publisher),
        ):
            console = Console(silent=quiet or not is_first())
            with console.loading("base") as progress:
                run = prepare_run(settings, folder, console.log, progress)
            check_tests(run.tests, console.log)
            if settings.train.best_by == "accuracy":
                check_tests(run.dev_tests, console.log)
            summary: dict[str, Any] = {}
            with claimed(folder, run.config):
                method = settings.adapter.method
                console.log(f"workdir {folder}: {run.model.num_layers} layers, {method}")
                before = evaluate_base(run, folder, console, preempted, metric)
                answers = scored_answers(run, metric)
                trainer = Trainer(run, folder, console.log, publisher=publisher, answers=answers)
                with console.progress("training", trainer.total_steps, "step") as bar:
                    fit = trainer.fit(bar.reach, preempted)
                after = evaluate_adapter(run, folder, console, preempted, metric)
                seconds = fit.earlier_seconds + time.monotonic() - started
                if is_first():
                    say = _discard if quiet else print
                    summary = write_report(run, folder, fit, before, after, seconds, say)
        require_learned(run, fit)
    return TrainResult(
        workdir=in_bucket(workdir) or Path(workdir),
        config=run.config,
        steps=fit.steps,
        best_step=fit.progress.best_step,
        scores=tuple(after),
        summary=summary,
    )


@contextmanager
def _refusals_in_one_line() -> Iterator[None]:
    """Raise what ends a command in one line as a UserError with that line."""
    try:
        yield
    except UserError as error:
        error.args = (exit_report(error).line,)
        raise
    except OSError as error:
        raise UserError(exit_report(error).line) from error


@contextmanager
def _stopping(stop: Callable[[], bool] | None, handle_signals: bool) -> Iterator[Callable[[], bool]]:
    """The function that a run asks whether to stop."""
    if not handle_signals:
        yield stop or _never
        return
    if threading.current_thread() is not threading.main_thread():
        raise UserError("handle_signals is True: expected False outside of the main thread")
    with watch_for_preemption_of_any() as signalled:
        # Processes of a cluster must ask for a signal equally often: first.
        yield signalled if stop is None else lambda: signalled() or stop()


def _never() -> bool:
    return False


def _discard(line: str) -> None:
    pass
