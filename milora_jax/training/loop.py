"""The training loop: steps, dev perplexity, checkpoints, early stopping, resume.

Bit-for-bit resume rests on three things: the rows of a step are a pure function of (seed, step); the
checkpoint holds all that the step changes, plus ``Progress``; and the best adapter is durable before the
checkpoint that mentions it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from milora_jax.adapters.hooks import abstract_params
from milora_jax.adapters.protocol import Adapter, init_adapter
from milora_jax.adapters.registry import adapter_shape, build_method
from milora_jax.base.modules import Base, frozen_kernels
from milora_jax.base.source import model_directory
from milora_jax.data.batches import batch_rows
from milora_jax.errors import NonFiniteError, Preempted, UserError
from milora_jax.parallel.processes import from_first, several
from milora_jax.parallel.rules import attend_over, state_shardings
from milora_jax.storage.adapters import adapter_metadata
from milora_jax.storage.checkpoint import CheckpointDirectory, Publisher, read_metadata, verify_step
from milora_jax.training.calibration import measured_features
from milora_jax.training.dev import DevAnswers, Judged, judged_on_dev
from milora_jax.training.health import step_figures
from milora_jax.training.optim import learning_rate_schedule, split_params
from milora_jax.training.preference import preference_figures
from milora_jax.training.prepare import Run
from milora_jax.training.progress import Fit, Pace, Progress, planned_steps
from milora_jax.training.start import reference_adapter, starting_params
from milora_jax.training.step import Steps, TrainState, init_state, make_steps
from milora_jax.training.trackers import RunLog
from milora_jax.types import Batch, Metrics, PyTree

KEPT_CHECKPOINTS = 2
"""Checkpoints to keep: the newest one, and one to fall back on."""


class Trainer:
    """One run's compiled programs, data and checkpoints; :meth:`fit` is the loop."""

    def __init__(
        self,
        run: Run,
        workdir: Path,
        log: Callable[[str], None],
        steps: Steps | None = None,
        publisher: Publisher | None = None,
        answers: DevAnswers | None = None,
    ) -> None:
        """Prepare to train.

        Args:
          steps: compiled programs of another run with the same model, number of steps and ``train`` settings,
            which saves their compilation; seed and learning rates may differ.
          publisher: see ``CheckpointDirectory``.
          answers: measures the answers to the dev rows, by which the best step is chosen; None where their
            loss decides.
        """
        train = run.config.train
        self._method, shape = build_method(run.config.adapter), adapter_shape(run.model)
        theta = split_params(Adapter(abstract_params(self._method, shape), self._method, shape))[1]
        self._bilevel = bool(jax.tree.leaves(theta))
        self._run, self._log, self._settings, self._answers = run, log, train, answers
        self._total = planned_steps(train, len(run.train))
        self._steps = steps or make_steps(
            run.model, train, self._total, lambda s: state_shardings(run.mesh, s), attend_over(run.mesh)
        )
        self._checkpoints = CheckpointDirectory(workdir / "checkpoints", KEPT_CHECKPOINTS, log, publisher)
        self._best = CheckpointDirectory(workdir / "best", None, log, publisher)
        self._workdir = workdir
        self._schedule = learning_rate_schedule(train, self._total, train.learning_rate)
        self._reference, self._reference_fingerprint = reference_adapter(run.config, run.model, run.mesh)
        self._more = (self._reference,) if train.prefers else ()
        self._answers_fingerprint = answers.fingerprint if answers else ""

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self._total

    def fit(self, advance: Callable[[int, str], None], preempted: Callable[[], bool]) -> Fit:
        """Train to the end, resuming from the newest good checkpoint.

        Args:
          advance: called after every step with the step number and a short status.
          preempted: called after every step; returns whether to save and stop.

        Raises:
          Preempted: ``preempted`` returned true; a checkpoint is written.
          NonFiniteError: ``max_bad_steps`` updates in a row were skipped, or a dev perplexity is not finite.
        """
        state, progress = self._restore_or_init()
        earlier_seconds = progress.seconds
        log = RunLog(self._workdir, self._run.config, int(state.step), self._log)
        try:
            state = self._take_steps(state, progress, log, advance, preempted)
        finally:
            log.close()
            if not several():  # a process that fails must not wait for the others
                self._checkpoints.settle()
                self._best.settle()
        self._checkpoints.wait()
        self._best.wait()
        return Fit(state, int(state.step), progress, earlier_seconds)

    def _take_steps(
        self,
        state: TrainState,
        progress: Progress,
        log: RunLog,
        advance: Callable[[int, str], None],
        preempted: Callable[[], bool],
    ) -> TrainState:
        """The loop of :meth:`fit`."""
        start, earlier_seconds, clock = int(state.step), progress.seconds, time.monotonic()
        if not start:
            # The measure of the untrained adapter: a run has learned something if it becomes lower.
            progress.first_perplexity = self._losses(state.adapter, Progress()).measure
        waiting: tuple[Metrics, Metrics | None] | None = None
        trained = judged = ""
        pace, compiled = Pace(), set[bool]()
        batch, tokens = self._training_batch(start)
        for step in range(start, self._total):
            if progress.stopped:
                break
            progress.tokens += tokens
            pace.count(tokens)
            state, metrics = self._steps.train(state, self._run.base, batch, *self._more)
            # The devices are busy now, so the next rows are sent to them before the host waits.
            batch, tokens = self._training_batch(step + 1)
            done = step + 1
            theta_metrics = None
            if self._bilevel and done % self._settings.coefficient_every == 0:
                state, theta_metrics = self._train_coefficients(state, done)
            # One step late, so that the device never waits for the host.
            self._count_bad(waiting, progress, done)
            waiting = metrics, theta_metrics
            if (with_theta := theta_metrics is not None) not in compiled:
                compiled.add(with_theta)  # the first step of its kind, whose time was mostly compilation
                jax.block_until_ready(waiting)
                pace.start()
            progress.seconds = earlier_seconds + time.monotonic() - clock
            shown = trained, judged
            if done % self._settings.log_every == 0 or done == self._total:
                jax.block_until_ready(waiting)
                trained = self._log_step(
                    log, done, metrics, pace.look() or progress.tokens / progress.seconds
                )
            if done % self._settings.eval_every == 0 or done == self._total:
                jax.block_until_ready(waiting)
                with pace.aside():
                    judged = self._evaluate(log, done, state.adapter, progress)
            last = done == self._total or progress.stopped
            stop = preempted()
            if last or stop or done % self._settings.save_every == 0:
                self._count_bad(waiting, progress, done)
                waiting = None
                with pace.aside():
                    self._save(state, done, progress)
            self._checkpoints.poll()
            self._best.poll()
            # Unchanged figures need no new picture.
            advance(done, "" if shown == (trained, judged) else ", ".join(filter(None, (trained, judged))))
            if stop:
                self._checkpoints.wait()
                raise Preempted(f"stopped: saved step {done}, run the same command again to continue")
        return state

    def _training_batch(self, step: int) -> tuple[Batch, int]:
        """The rows of a step on the devices, and their number of tokens without padding."""
        rows = batch_rows(self._settings.seed, step, len(self._run.train), self._settings.batch_size)
        return self._run.batch(self._run.train, rows), int(self._run.train.lengths[rows].sum())

    def _restore_or_init(self) -> tuple[TrainState, Progress]:
        """Restore the newest good checkpoint, or make a fresh state."""
        config = self._run.config
        adapter_key, step_key = jax.random.split(jax.random.key(config.train.seed))

        shape, calibration = adapter_shape(self._run.model), self._method.calibration

        def fresh(base: Base, params: PyTree, measured: PyTree) -> TrainState:
            if params is None:
                adapter = init_adapter(self._method, adapter_key, shape, frozen_kernels(base))
            else:
                adapter = Adapter(params=params, method=self._method, shape=shape)
            if calibration is not None and measured is not None:
                params = calibration.store(adapter.params, *map(jnp.asarray, measured))
                adapter = dataclasses.replace(adapter, params=params)
            return init_state(adapter, step_key, config.train, self._total)

        shapes = jax.eval_shape(fresh, self._run.base, None, None)
        shardings = state_shardings(self._run.mesh, shapes)
        found = self._checkpoints.newest()
        newest = from_first(-1 if found is None else found)
        newest = None if newest == -1 else newest
        if newest is None and self._checkpoints.steps():
            raise UserError(
                f"every checkpoint of {str(self._workdir)!r} is damaged: put a good copy back, or start "
                "again in another --workdir"
            )
        if newest is None:
            # Laid out when it is made: a state that changes its layout after step 1 compiles step 2 again.
            params = None
            if config.train.init_from:
                base = model_directory(config.model.path)
                params = starting_params(config.train.init_from, self._method, shape, base)
            measured = None if params is not None else self._measured()
            return jax.jit(fresh, out_shardings=shardings)(self._run.base, params, measured), Progress()
        abstract = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            shapes,
            shardings,
        )
        state, metadata = self._checkpoints.restore(newest, abstract)
        # A checkpoint from before the token fingerprint existed does not have it.
        metadata.setdefault("token_fingerprint", self._run.token_fingerprint)
        metadata.setdefault("reference_fingerprint", "")
        metadata.setdefault("answers_fingerprint", "")
        for found, name, what in (
            (self._run.data_fingerprint, "data_fingerprint", "training or dev rows"),
            (self._run.token_fingerprint, "token_fingerprint", "tokens of the training or dev rows"),
            (self._run.base_fingerprint, "base_fingerprint", "files of the base"),
            (self._reference_fingerprint, "reference_fingerprint", "reference adapter, train.init_from,"),
            (
                self._answers_fingerprint,
                "answers_fingerprint",
                "eval settings, dev rows or metric of best_by",
            ),
        ):
            if metadata[name] != found:
                raise UserError(
                    f"the {what} changed since step {newest} of {str(self._workdir)!r}: use another --workdir"
                )
        progress = Progress.from_json(metadata["progress"])
        if progress.best_step:
            verify_step(self._best.root / str(progress.best_step))
        ended = newest >= self._total or progress.stopped
        self._log(f"trained already: ended at step {newest}" if ended else f"resuming at step {newest}")
        return state, progress

    def _measured(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The measured statistics of the router's features; empty where it has none."""
        calibration = self._method.calibration
        if calibration is None:
            return None
        attend = attend_over(self._run.mesh)
        return measured_features(self._run, calibration, attend, self._log)

    def _train_coefficients(self, state: TrainState, done: int) -> tuple[TrainState, Metrics]:
        """Take one update of Theta on dev rows (Appendix A)."""
        index = done // self._settings.coefficient_every - 1
        rows = batch_rows(self._settings.seed, index, len(self._run.dev), self._settings.batch_size)
        batch = self._run.batch(self._run.dev, rows)
        return self._steps.coefficients(state, self._run.base, batch, *self._more)

    def _count_bad(
        self, waiting: tuple[Metrics, Metrics | None] | None, progress: Progress, done: int
    ) -> None:
        """Count skipped updates, which leave parameters unchanged, and stop the run at the limit."""
        if waiting is None:
            return
        omega, theta = waiting
        bad = int(omega.bad_steps)
        progress.zero_gradients = progress.zero_gradients + 1 if float(omega.grad_norm) == 0.0 else 0
        progress.skipped += bad > 0
        if theta is not None:
            skipped = int(theta.bad_steps) > 0
            progress.skipped += skipped
            progress.bad_theta = progress.bad_theta + 1 if skipped else 0
        worst = max(bad, progress.bad_theta)
        if worst >= self._settings.max_bad_steps:
            self._checkpoints.wait()
            raise NonFiniteError(
                f"{worst} updates in a row had a loss or gradient that is not finite (near step {done}); "
                f"stopped before step {done} was saved, nothing was spoiled; lower train.learning_rate"
            )

    def _preference(self, metrics: Metrics) -> dict[str, float | None]:
        """The figures of a step of a preference objective."""
        sums = metrics.preference
        return {} if sums is None else preference_figures(sums, self._settings.objective)

    def _log_step(self, log: RunLog, done: int, metrics: Metrics, speed: float) -> str:
        loss = float(metrics.loss)
        log.log(
            done,
            {
                "loss": loss,
                "cross_entropy": float(metrics.cross_entropy),
                "load_balance": float(metrics.load_balance),
                "grad_norm": float(metrics.grad_norm),
                **step_figures(self._method, done - 1, self._total, metrics),
                "learning_rate": float(np.asarray(self._schedule(done - 1))),
                "bad_steps": int(metrics.bad_steps),
                **self._preference(metrics),
                "tokens_per_second": speed,
            },
        )
        return f"loss {loss:.3f}, {speed:,.0f} tokens/s"

    def _evaluate(self, log: RunLog, done: int, adapter: Adapter, progress: Progress) -> str:
        """Compute the dev figures; store the adapter if it is the best so far."""
        judged = self._losses(adapter, progress)
        measure, health, name = judged.measure, judged.health, self._run.measure
        ready = self._method.ready(done, self._total)
        if self._answers and ready and math.isfinite(measure):
            judged = dataclasses.replace(judged, answers=self._answers(adapter))
        log.log(done, judged.to_json())
        if not math.isfinite(measure):
            raise NonFiniteError(
                f"the {name} of step {done} is not finite; stopped before it was saved; "
                "lower train.learning_rate or use another model.dtype"
            )
        progress.last_perplexity = measure
        if reason := progress.saturated(self._run.guess):
            self._log(f"step {done}: nothing is being learned: {reason}; lower train.learning_rate")
        if health is not None and (warning := health.warning(self._run.config.adapter)):
            self._log(f"step {done}: {warning}")
        if not ready:
            return f"{name} {measure:.3f}, not yet within its budget"
        if self._is_best(judged, progress):
            progress.best_step, progress.stale = done, 0
            metadata = adapter_metadata(
                self._method,
                adapter.shape,
                self._run.base_fingerprint,
                self._run.config.model.quantize,
                self._run.config.prompt_format,
            )
            share = None if health is None else health.share.tolist()
            found = {
                "dev_perplexity": judged.perplexity,
                **({} if judged.loss is None else {"dev_loss": judged.loss}),
                **({} if judged.answers is None else {"dev_answers": judged.answers}),
                "expert_share": share,
                "tunable_parameters": self._method.count_parameters(adapter.params),
            }
            self._best.save(done, adapter.params, {**metadata, **found})
        else:
            progress.stale += 1
            progress.stopped = 0 < self._settings.patience <= progress.stale
        if self._answers is None:
            return f"{name} {measure:.3f}, best {progress.best_perplexity:.3f}"
        return (
            f"{name} {measure:.3f}, {self._answers.name} {judged.answers:.3f}, best at {progress.best_step}"
        )

    def _is_best(self, judged: Judged, progress: Progress) -> bool:
        """Whether an adapter is better than all before; their best figures are updated."""
        lower = judged.measure < progress.best_perplexity
        progress.best_perplexity = min(judged.measure, progress.best_perplexity)
        if self._answers is None or judged.answers is None:
            return lower
        value = judged.answers if self._answers.lowest else -judged.answers
        better = value < progress.best_answers
        progress.best_answers = min(value, progress.best_answers)
        return better

    def _losses(self, adapter: Adapter, progress: Progress) -> Judged:
        """The losses and routes of an adapter on the dev rows."""
        return judged_on_dev(self._run, self._steps, adapter, self._reference, progress, self._log)

    def _save(self, state: TrainState, done: int, progress: Progress) -> None:
        """Write a checkpoint of ``done`` steps, after the best adapter that it mentions is on disk.

        A best adapter is deleted only when no checkpoint on the disk mentions it any more: a run that goes
        back to an older checkpoint must find it.
        """
        self._best.wait()
        self._checkpoints.wait()
        kept = {progress.best_step, *self._bests_of_checkpoints()}
        metadata = {
            "progress": progress.to_json(),
            "data_fingerprint": self._run.data_fingerprint,
            "token_fingerprint": self._run.token_fingerprint,
            "base_fingerprint": self._run.base_fingerprint,
            **({"reference_fingerprint": self._reference_fingerprint} if self._reference else {}),
            **({"answers_fingerprint": self._answers_fingerprint} if self._answers else {}),
        }
        self._checkpoints.save(done, state, metadata)
        self._best.delete_except(kept)

    def _bests_of_checkpoints(self) -> set[int]:
        """The best steps that the checkpoints on the disk mention."""
        found = set()
        for step in self._checkpoints.steps():
            with suppress(UserError):  # a run never goes back to a damaged checkpoint
                found.add(read_metadata(self._checkpoints.root, step)["progress"]["best_step"])
        return found
