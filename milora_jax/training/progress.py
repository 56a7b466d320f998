"""What the host remembers of a run between its steps, and what a run gives back."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from milora_jax.config import TrainSection
from milora_jax.training.step import TrainState


@dataclass
class Progress:
    """What the host remembers between steps; saved with every checkpoint.

    Attributes:
      best_step, best_perplexity: the dev evaluation with the lowest perplexity so far.
      stale: evaluations since then.
      skipped: updates skipped because something was not finite.
      bad_theta: updates of Theta skipped in a row.
      stopped: whether patience ran out.
      tokens: tokens trained on, padding left out, counted over all lives of the run.
      seconds: time spent in :meth:`Trainer.fit`, over all lives of the run.
      dev_routes: the routes of the dev prompts at the last evaluation, packed; empty without.
    """

    best_step: int = 0
    best_perplexity: float = math.inf
    stale: int = 0
    skipped: int = 0
    bad_theta: int = 0
    stopped: bool = False
    tokens: int = 0
    seconds: float = 0.0
    dev_routes: str = ""

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
      earlier_seconds: training time of the run's earlier lives.
    """

    state: TrainState
    steps: int
    progress: Progress
    earlier_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all rows, padding left out, over the training time of all lives."""
        return self.progress.tokens / self.progress.seconds


class Pace:
    """Tokens per second of the steps since the last look: without compilation, evaluations and saves."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with nothing counted.

        Args:
          clock: seconds from any beginning.
        """
        self._clock, self._since = clock, clock()
        self._tokens, self._seconds = 0, 0.0

    def start(self) -> None:
        """Forget what has been counted: it was the first step, which compiles."""
        self._tokens, self._seconds, self._since = 0, 0.0, self._clock()

    def count(self, tokens: int) -> None:
        """Note that a step with so many tokens was begun."""
        self._tokens += tokens

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Do not count the time of a ``with`` block; the steps so far must have ended."""
        self._seconds += self._clock() - self._since
        try:
            yield
        finally:
            self._since = self._clock()

    def look(self) -> float | None:
        """The speed of the steps since the last look, which must have ended; None where there was none."""
        seconds = self._seconds + self._clock() - self._since
        tokens = self._tokens
        self.start()
        return tokens / seconds if tokens and seconds else None


def planned_steps(settings: TrainSection, rows: int) -> int:
    """Optimiser steps of a whole run: the shorter of ``epochs`` and ``max_steps``."""
    by_epochs = max(1, settings.epochs * rows // settings.batch_size)
    return min(by_epochs, settings.max_steps) if settings.max_steps else by_epochs
