"""Scores of every test row, stored so that methods can be compared row by row."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from milora_jax.adapters.protocol import Adapter
from milora_jax.base.modules import Base
from milora_jax.data.records import Record
from milora_jax.evaluation.likelihood import Passage, log_likelihoods
from milora_jax.evaluation.loss import encode_responses
from milora_jax.evaluation.score import TaskScore
from milora_jax.evaluation.statistics import Sample
from milora_jax.shapes import Float
from milora_jax.storage.files import read_json, write_json_atomic
from milora_jax.training.prepare import Run

NAME = "test_rows.json"
"""File of a scored cell: one list per field under the name of a route (or ``routed``) and the task."""

ROUTED = "routed"
"""Name of the routes that the adapter's routers choose, the only ones of a method without routers."""


@dataclass(frozen=True)
class RowScores:
    """Scores of the test rows of a task, in order.

    Attributes:
      nll: negative log-likelihood of the output, in nats; infinite after a diverged run.
      tokens: number of response tokens; 0 where the row has no output to score.
      exact: 1 where greedy decoding writes the output token for token.
      correct: 1 where the generated answer is right; None where none was generated.
    """

    nll: Float[np.ndarray, " N"]
    tokens: Float[np.ndarray, " N"]
    exact: Float[np.ndarray, " N"]
    correct: Float[np.ndarray, " N"] | None = None

    @property
    def loss(self) -> float | None:
        """Negative log-likelihood per response token, in nats; None where it is not finite."""
        mean = self.nll.sum() / max(self.tokens.sum(), 1)
        return float(mean) if math.isfinite(mean) else None

    @property
    def accuracy(self) -> float:
        """Share of the rows that are right; 0 where that is unknown."""
        return 0.0 if self.correct is None else float(self.correct.mean())

    def first(self, rows: int) -> RowScores:
        """The scores of the first rows; 0 is all of them."""
        end = rows or None
        correct = None if self.correct is None else self.correct[:end]
        return RowScores(self.nll[:end], self.tokens[:end], self.exact[:end], correct)

    def to_json(self) -> dict[str, Any]:
        """Convert to lists of numbers; infinity, which JSON does not have, becomes null."""
        nll = [round(float(x), 5) if math.isfinite(x) else None for x in self.nll]
        others = {"tokens": self.tokens, "exact": self.exact, "correct": self.correct}
        return {"nll": nll} | {k: None if v is None else v.astype(int).tolist() for k, v in others.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RowScores:
        """Inverse of :meth:`to_json`."""
        nll = [math.inf if x is None else x for x in values["nll"]]
        correct = None if values["correct"] is None else np.array(values["correct"], float)
        tokens, exact = (np.array(values[name], float) for name in ("tokens", "exact"))
        return cls(np.array(nll), tokens, exact, correct)


ByTask = dict[str, RowScores]


class Encoded:
    """The test rows of a task as passages, if they have an output.

    Attributes:
      passages: passages of the rows with an output; ``places`` are their places among all ``count`` rows.
    """

    def __init__(self, run: Run, records: Sequence[Record]) -> None:
        """Encode every row by itself, so that each keeps its place."""
        each = [
            encode_responses(run.tokenizer, [record], run.model, run.config.prompt_format).passages
            for record in records
        ]
        self.count = len(each)
        self.places = [place for place, found in enumerate(each) if found]
        self.passages: list[Passage] = [passage for found in each for passage in found]

    def scores(
        self,
        run: Run,
        base: Base,
        adapter: Adapter,
        routes: Float[np.ndarray, "N L E"] | None,
        advance: Callable[[int], None],
    ) -> RowScores:
        """Compute the likelihoods of the rows.

        Args:
          base, adapter: both in the decode layout.
          routes: routes of ``passages``, in place of those that the routers choose.
          advance: called with the number of rows each time some are scored; it may raise to stop.
        """
        nll, exact = np.zeros(self.count), np.zeros(self.count)
        size = run.config.eval.batch_size
        for found in log_likelihoods(
            base, run.model, adapter, self.passages, size, routes=routes, layout=run.layout
        ):
            for number, each in found.items():
                nll[self.places[number]], exact[self.places[number]] = -each.log_probability, each.greedy
            advance(len(found))
        return RowScores(nll, self.tokens, exact)

    @property
    def tokens(self) -> Float[np.ndarray, " N"]:
        """Number of response tokens of all rows."""
        tokens = np.zeros(self.count)
        tokens[self.places] = [passage.scored for passage in self.passages]
        return tokens

    def nothing(self) -> RowScores:
        """Scores of a run that diverged: no row is right, and no output is probable."""
        return RowScores(np.full(self.count, np.inf), self.tokens, np.zeros(self.count), np.zeros(self.count))


def with_answers(scores: RowScores, score: TaskScore) -> RowScores:
    """Add whether the generated answers are right."""
    correct = np.array([prediction.correct for prediction in score.predictions], float)
    return dataclasses.replace(scores, correct=correct)


def write_scores(workdir: Path, scores: Mapping[str, ByTask]) -> None:
    """Write the scores by route and task."""
    values = {
        route: {task: each.to_json() for task, each in tasks.items()} for route, tasks in scores.items()
    }
    write_json_atomic(workdir / NAME, values)


def read_scores(workdir: Path) -> dict[str, ByTask]:
    """Read the scores that :func:`write_scores` wrote."""
    return {
        route: {task: RowScores.from_json(each) for task, each in tasks.items()}
        for route, tasks in read_json(workdir / NAME).items()
    }


def accuracy_sample(scores: Sequence[RowScores]) -> Sample:
    """Sample of right answers in percent, of the same rows under several seeds."""
    values = np.stack([100.0 * (np.zeros(len(s.nll)) if s.correct is None else s.correct) for s in scores])
    return Sample(values, np.ones(values.shape[1]))


def exact_sample(scores: Sequence[RowScores]) -> Sample:
    """Sample of outputs that greedy decoding writes token for token, in percent."""
    return Sample(np.stack([100.0 * s.exact for s in scores]), np.ones(len(scores[0].exact)))


def loss_sample(scores: Sequence[RowScores]) -> Sample:
    """Sample of negative log-likelihoods over response tokens."""
    return Sample(np.stack([s.nll for s in scores]), scores[0].tokens)
