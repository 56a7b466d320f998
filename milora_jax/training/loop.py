"""The training loop: steps, dev perplexity, checkpoints, early stopping, resume.

Bit-for-bit resume rests on three things: the rows of a step are a pure function of (seed, step); the
checkpoint holds all that the step changes, plus ``Progress``; and the best adapter is durable before
the checkpoint that mentions it.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from milora_jax.adapters.protocol import Adapter, init_adapter
from milora_jax.adapters.registry import adapter_shape, build_method
from milora_jax.config import TrainSection
from milora_jax.data.batches import batch_rows, collate, padded_length
from milora_jax.data.tokens import Example
from milora_jax.errors import NonFiniteError, Preempted, UserError
from milora_jax.parallel.rules import state_shardings
from milora_jax.storage.adapters import adapter_metadata
from milora_jax.storage.checkpoint import CheckpointDirectory
from milora_jax.training.optim import learning_rate_schedule
from milora_jax.training.prepare import ROW_MULTIPLE, Run
from milora_jax.training.step import Steps, TrainState, init_state, make_steps
from milora_jax.training.workdir import MetricsLog
from milora_jax.types import Batch, Metrics

KEPT_CHECKPOINTS = 2
"""The newest and one to fall back on."""


@dataclass
class Progress:
    """What the host remembers between steps; saved with every checkpoint.

    Attributes:
      best_step, best_perplexity: the dev evaluation with the lowest perplexity so far.
      stale: evaluations since then.
      skipped: updates skipped because something was not finite.
      stopped: whether patience ran out.
    """

    best_step: int = 0
    best_perplexity: float = math.inf
    stale: int = 0
    skipped: int = 0
    stopped: bool = False

    def to_json(self) -> dict:
        """Plain values; an infinite perplexity, which JSON cannot carry, becomes null."""
        values = dataclasses.asdict(self)
        values["best_perplexity"] = self.best_perplexity if math.isfinite(self.best_perplexity) else None
        return values

    @classmethod
    def from_json(cls, values: dict) -> Progress:
        """Inverse of :meth:`to_json`."""
        perplexity = values["best_perplexity"]
        return cls(**{**values, "best_perplexity": math.inf if perplexity is None else perplexity})


@dataclass(frozen=True)
class Fit:
    """What training gives back.

    Attributes:
      steps: optimiser steps taken.
      tokens_per_second: tokens of all rows, padding left out, over this process's training time;
        0 where nothing was left to train.
    """

    state: TrainState
    steps: int
    progress: Progress
    tokens_per_second: float


def planned_steps(settings: TrainSection, rows: int) -> int:
    """Optimiser steps of a whole run: the shorter of ``epochs`` and ``max_steps``."""
    by_epochs = max(1, settings.epochs * rows // settings.batch_size)
    return min(by_epochs, settings.max_steps) if settings.max_steps else by_epochs


class Trainer:
    """One run's compiled programs, data and checkpoints; :meth:`fit` is the loop."""

    def __init__(self, run: Run, workdir: Path, say: Callable[[str], None]) -> None:
        config = run.config
        self._run, self._say, self._settings = run, say, config.train
        self._total = planned_steps(config.train, len(run.train))
        longest = max(len(example.tokens) for example in [*run.train, *run.dev])
        self._length = padded_length(longest, ROW_MULTIPLE, config.data.max_length)
        self._steps: Steps = make_steps(run.model, config.adapter, config.train, self._total, 1)
        self._bilevel = (
            config.adapter.coefficients == "bilevel"
            and config.adapter.activation == "rational"
            and config.adapter.method == "milora"
        )
        self._checkpoints = CheckpointDirectory(workdir / "checkpoints", KEPT_CHECKPOINTS, say)
        self._best = CheckpointDirectory(workdir / "best", 1, say)
        self._workdir = workdir
        self._schedule = learning_rate_schedule(
            config.train.learning_rate, config.train.warmup_share, self._total
        )

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self._total

    def fit(self, advance: Callable[[int, str], None]) -> Fit:
        """Train to the end, resuming from the newest good checkpoint.

        Args:
          advance: called after every step with the step number and a short status.

        Raises:
          Preempted: after SIGTERM, with a checkpoint written.
          NonFiniteError: after ``max_bad_steps`` skipped updates in a row.
        """
        state, progress = self._restore_or_init()
        start = int(state.step)
        log = MetricsLog(self._workdir, start)
        tokens, clock = 0, time.monotonic()
        waiting: list[Metrics | None] = []
        with _sigterm_flag() as preempted:
            for step in range(start, self._total):
                if progress.stopped:
                    break
                rows = batch_rows(self._settings.seed, step, len(self._run.train), self._settings.batch_size)
                examples = [self._run.train[i] for i in rows]
                tokens += sum(len(example.tokens) for example in examples)
                state, metrics = self._steps.train(state, self._run.base, self._batch(examples))
                done = step + 1
                theta_metrics = None
                if self._bilevel and done % self._settings.coefficient_every == 0:
                    state, theta_metrics = self._train_coefficients(state, done)
                # One step late, so that the device never waits for the host to look.
                self._count_bad(waiting, progress, done)
                waiting = [metrics, theta_metrics]
                status = ""
                if done % self._settings.log_every == 0 or done == self._total:
                    speed = tokens / (time.monotonic() - clock)
                    status = self._log_step(log, done, metrics, speed)
                if done % self._settings.eval_every == 0 or done == self._total:
                    status = self._evaluate(log, done, state.adapter, progress)
                last, stop = done == self._total or progress.stopped, preempted()
                if last or stop or done % self._settings.save_every == 0:
                    self._count_bad(waiting, progress, done)
                    waiting = []
                    self._save(state, done, progress)
                self._checkpoints.poll()
                advance(done, status)
                if stop and not last:
                    self._checkpoints.wait()
                    raise Preempted(f"SIGTERM: saved step {done}, run the same command again to continue")
        seconds = time.monotonic() - clock
        self._checkpoints.wait()
        self._best.wait()
        return Fit(state, int(state.step), progress, tokens / seconds if tokens else 0.0)

    def _batch(self, examples: list[Example]) -> Batch:
        batch = collate(examples, self._length, 0, self._settings.batch_size)
        return self._run.place(batch)

    def _restore_or_init(self) -> tuple[TrainState, Progress]:
        """The newest good checkpoint's state, or a fresh one."""
        config = self._run.config
        adapter_key, step_key = jax.random.split(jax.random.key(config.train.seed))

        def fresh() -> TrainState:
            method = build_method(config.adapter)
            adapter = init_adapter(method, adapter_key, adapter_shape(self._run.model))
            return init_state(adapter, step_key, config.train, config.adapter.coefficients, self._total)

        shapes = jax.eval_shape(fresh)
        shardings = state_shardings(self._run.mesh, self._run.rules, shapes)
        newest = self._checkpoints.newest()
        if newest is None:
            # Sharded from birth: a state that changes its layout after step 1 compiles step 2 again.
            return jax.jit(fresh, out_shardings=shardings)(), Progress()
        abstract = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            shapes,
            shardings,
        )
        state, metadata = self._checkpoints.restore(newest, abstract)
        if metadata["data_fingerprint"] != self._run.data_fingerprint:
            raise UserError(
                f"the training or dev rows changed since step {newest} of {str(self._workdir)!r}: "
                "use another --workdir"
            )
        self._say(f"resuming at step {newest}")
        return state, Progress.from_json(metadata["progress"])

    def _train_coefficients(self, state: TrainState, done: int) -> tuple[TrainState, Metrics]:
        """One update of Theta on dev rows (Appendix A)."""
        index = done // self._settings.coefficient_every - 1
        rows = batch_rows(self._settings.seed, index, len(self._run.dev), self._settings.batch_size)
        batch = self._batch([self._run.dev[i] for i in rows])
        return self._steps.coefficients(state, self._run.base, batch)

    def _count_bad(self, waiting: list[Metrics | None], progress: Progress, done: int) -> None:
        """Count skipped updates; stop the run at the limit. Parameters are untouched by them."""
        bad = [int(metrics.bad_steps) for metrics in waiting if metrics is not None]
        progress.skipped += sum(count > 0 for count in bad)
        worst = max(bad, default=0)
        if worst >= self._settings.max_bad_steps:
            self._checkpoints.wait()
            raise NonFiniteError(
                f"{worst} updates in a row had a loss or gradient that is not finite (near step {done}); "
                f"stopped before step {done} was saved, nothing was spoiled; lower train.learning_rate"
            )

    def _log_step(self, log: MetricsLog, done: int, metrics: Metrics, speed: float) -> str:
        loss = float(metrics.loss)
        log.write(
            done,
            {
                "loss": loss,
                "cross_entropy": float(metrics.cross_entropy),
                "load_balance": float(metrics.load_balance),
                "grad_norm": float(metrics.grad_norm),
                "pooled_max": float(metrics.pooled_max),
                "learning_rate": float(np.asarray(self._schedule(done - 1))),
                "bad_steps": int(metrics.bad_steps),
                "tokens_per_second": speed,
            },
        )
        return f"loss {loss:.3f}, {speed:,.0f} tokens/s"

    def _evaluate(self, log: MetricsLog, done: int, adapter: Adapter, progress: Progress) -> str:
        """Dev perplexity; keeps the adapter if it is the best so far."""
        perplexity, share = self.dev_perplexity(adapter)
        log.write(done, {"dev_perplexity": perplexity, "expert_share": share.round(4).tolist()})
        if perplexity < progress.best_perplexity:
            progress.best_step, progress.best_perplexity, progress.stale = done, perplexity, 0
            config = self._run.config
            metadata = adapter_metadata(config.adapter, adapter.shape)
            found = {"dev_perplexity": perplexity, "expert_share": share.tolist()}
            self._best.save(done, adapter.params, {**metadata, **found})
        else:
            progress.stale += 1
            progress.stopped = 0 < self._settings.patience <= progress.stale
        return f"dev perplexity {perplexity:.3f}, best {progress.best_perplexity:.3f}"

    def dev_perplexity(self, adapter: Adapter) -> tuple[float, np.ndarray]:
        """exp of the mean loss over all dev response tokens, and the experts' mean share ``[L, E]``."""
        size, total, count = self._settings.batch_size, 0.0, 0
        shares, rows = [], []
        for start in range(0, len(self._run.dev), size):
            examples = self._run.dev[start : start + size]
            loss, tokens, share = self._steps.evaluate(adapter, self._run.base, self._batch(examples))
            total, count = total + float(loss), count + int(tokens)
            shares.append(np.asarray(share))
            rows.append(len(examples))
        mean_share = np.average(np.stack(shares), axis=0, weights=rows)
        return math.exp(min(total / count, 700.0)), mean_share

    def _save(self, state: TrainState, done: int, progress: Progress) -> None:
        """A checkpoint of ``done`` steps, after the best adapter it speaks of is on disk."""
        self._best.wait()
        metadata = {"progress": progress.to_json(), "data_fingerprint": self._run.data_fingerprint}
        self._checkpoints.save(done, state, metadata)


@contextmanager
def _sigterm_flag() -> Iterator[Callable[[], bool]]:
    """Note SIGTERM instead of dying of it; yields a function that tells whether it came."""
    came = False

    def note(signum: int, frame: object) -> None:
        nonlocal came
        came = True

    old = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGTERM, old)
