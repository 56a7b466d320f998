"""The state of a run on the host between its steps, and the result of a run."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from milora_jax.config import TrainSection
from milora_jax.training.step import TrainState

SURELY_UNIFORM = 0.999
"""A model whose perplexity reaches this share of the uniform guess's has lost all that it knew."""

FEW_ZEROS = 3
"""Number of exactly zero gradients in a row that is no accident."""


@dataclass
class Progress:
    """The state of a run on the host between steps, saved with every checkpoint.

    Attributes:
      best_step, best_perplexity: the dev evaluation with the lowest perplexity so far. With a preference
        objective all perplexities here are dev losses.
      best_answers: measure of the dev rows' answers at the best step, where that decides which is the best;
        negative where the highest is the best. ``best_perplexity`` is the lowest one even then.
      stale: number of evaluations since the best step.
      skipped: number of updates that were skipped because something was not finite.
      bad_theta: number of updates of Theta skipped in a row.
      stopped: whether patience ran out.
      tokens: tokens trained on, without padding, over all starts of the run.
      seconds: time spent in :meth:`Trainer.fit`, over all starts of the run.
      dev_routes: the routes of the dev prompts at the last evaluation, packed; empty without routes.
      first_perplexity: dev perplexity before the first step; infinite where it is not known.
      last_perplexity: dev perplexity of the last evaluation.
      zero_gradients: number of steps in a row, up to the last one, whose gradient was exactly zero.
    """

    best_step: int = 0
    best_perplexity: float = math.inf
    best_answers: float = math.inf
    stale: int = 0
    skipped: int = 0
    bad_theta: int = 0
    stopped: bool = False
    tokens: int = 0
    seconds: float = 0.0
    dev_routes: str = ""
    first_perplexity: float = math.inf
    last_perplexity: float = math.inf
    zero_gradients: int = 0

    def to_json(self) -> dict:
        """Convert to plain values; an infinite perplexity, which JSON cannot hold, becomes null."""
        return {
            name: None if value == math.inf else value for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_json(cls, values: dict) -> Progress:
        """Inverse of :meth:`to_json`; a checkpoint of an older version may lack fields."""
        known: dict[str, Any] = {name: math.inf if value is None else value for name, value in values.items()}
        return cls(**known)

    def saturated(self, guess: float | int) -> str:
        """A line if certainly nothing can be learned any more, else "".

        Args:
          guess: V, the perplexity of the uniform guess; infinite with a preference objective.
        """
        # Before the first step a model may be worse than that guess, on rows unlike all it has seen.
        if self.last_perplexity >= max(self.first_perplexity, SURELY_UNIFORM * guess):
            return f"the dev perplexity {self.last_perplexity:.1f} is no better than a guess among {guess}"
        if self.zero_gradients >= FEW_ZEROS and self.last_perplexity >= self.first_perplexity:
            return f"the gradients of the last {self.zero_gradients} steps were exactly zero"
        return ""

    def unlearned(self, guess: float | int, measure: str = "dev perplexity") -> str:
        """A line if a run that has ended has learned nothing, else "".

        Args:
          guess: as in :meth:`saturated`.
          measure: name of what the perplexities here are.
        """
        if self.best_perplexity < self.first_perplexity < math.inf:
            return ""
        reason = self.saturated(guess)
        if self.first_perplexity == math.inf:
            return reason
        best = f"no {measure} was below that before the first step, {self.first_perplexity:.3f}"
        return f"{best}; {reason}" if reason else best


@dataclass(frozen=True)
class Fit:
    """The result of training.

    Attributes:
      steps: number of optimiser steps.
      earlier_seconds: training time of the run's earlier starts.
    """

    state: TrainState
    steps: int
    progress: Progress
    earlier_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all rows, without padding, over the training time of all starts."""
        return self.progress.tokens / self.progress.seconds


class Pace:
    """Speed in tokens per second, without compilation, evaluations and saves."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with nothing counted.

        Args:
          clock: returns seconds since some moment.
        """
        self._clock, self._since = clock, clock()
        self._tokens, self._seconds = 0, 0.0

    def start(self) -> None:
        """Discard what has been counted, the first step, which compiles."""
        self._tokens, self._seconds, self._since = 0, 0.0, self._clock()

    def count(self, tokens: int) -> None:
        """Count a step of so many tokens, which has begun."""
        self._tokens += tokens

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Exclude the time of a ``with`` block; earlier steps must have ended."""
        self._seconds += self._clock() - self._since
        try:
            yield
        finally:
            self._since = self._clock()

    def look(self) -> float | None:
        """The speed of the steps since the last call, which must have ended; None if there were none."""
        seconds = self._seconds + self._clock() - self._since
        tokens = self._tokens
        self.start()
        return tokens / seconds if tokens and seconds else None


def planned_steps(settings: TrainSection, rows: int) -> int:
    """Optimiser steps of a whole run: the shorter of ``epochs`` and ``max_steps``."""
    by_epochs = max(1, settings.epochs * rows // settings.batch_size)
    return min(by_epochs, settings.max_steps) if settings.max_steps else by_epochs
