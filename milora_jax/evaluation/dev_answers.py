"""The measure of a run's answers to its dev rows, by which ``train.best_by`` chooses the best step."""

from __future__ import annotations

import hashlib
import json

import numpy as np

from milora_jax.adapters.protocol import Adapter
from milora_jax.data.records import fingerprint
from milora_jax.evaluation.final import score_tests
from milora_jax.evaluation.own_metric import OwnMetric
from milora_jax.evaluation.score import TaskScore
from milora_jax.parallel.processes import float_from_first, to_host
from milora_jax.training.prepare import Run


class ScoredAnswers:
    """Answers the dev rows greedily, as test rows are answered, and measures the answers.

    It is a ``training.dev.DevAnswers``: the mean over dev sources of the accuracy, or of the user's metric.
    """

    def __init__(self, run: Run, metric: OwnMetric | None) -> None:
        """Prepare; nothing is compiled before the first call.

        Args:
          run: with ``dev_tests``.
          metric: the function of ``eval.metric``, which must be there unless accuracy decides.
        """
        by = run.config.train.best_by
        self._run, self._metric = run, None if by == "accuracy" else metric
        self.name = "dev accuracy" if by == "accuracy" else "dev metric"
        self.lowest = by == "lowest_metric"
        settings = run.config.eval
        values = [
            {name: fingerprint(records) for name, records in run.dev_tests.items()},
            settings.max_new_tokens,
            self._metric.digest if self._metric else "",
        ]
        self.fingerprint = hashlib.sha256(json.dumps(values).encode()).hexdigest()

    def __call__(self, adapter: Adapter) -> float:
        """Measure an adapter in training.

        The base in the layout for decoding is made for the call: kept, it would be a second base beside the
        one that the steps read.

        Raises:
          UserError: the user's metric raises, or gives no finite numbers.
        """
        run = self._run
        scores = score_tests(run, run.decoding_base(), to_host(adapter), tests=run.dev_tests)
        # A metric that draws random numbers must not part the processes.
        return float_from_first(float(np.mean([self._value(score) for score in scores])))

    def _value(self, score: TaskScore) -> float:
        if self._metric is None:
            return score.accuracy or 0.0
        texts = [each.generated for each in score.predictions]
        return self._metric.value(score.task, texts, self._run.dev_tests[score.task])


def scored_answers(run: Run, metric: OwnMetric | None) -> ScoredAnswers | None:
    """The measure that chooses the best step of a run; None where the dev loss does."""
    return ScoredAnswers(run, metric) if run.dev_tests else None
