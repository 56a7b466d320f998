"""Confidence intervals of accuracies and of differences."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from milora_jax.shapes import Float

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and the interval of :data:`CONFIDENCE` around it."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Sample:
    """Values of the test rows of one task, under several seeds.

    The mean of a task is the sum of the values over the sum of the weights: with ``correct`` as values and
    weights of 1 it is the accuracy, with log-likelihoods and response tokens the loss per token.

    Attributes:
      values: values by seed and row.
      weights: weights of the rows, equal for all seeds.
    """

    values: Float[np.ndarray, "S N"]
    weights: Float[np.ndarray, " N"]

    @property
    def mean(self) -> float:
        """The mean of the task over all seeds."""
        return float(self.values.sum(axis=1).mean() / self.weights.sum())


class Difference(NamedTuple):
    """The difference of two methods.

    Attributes:
      absolute: difference in the unit of the values.
      relative: difference as a share of the other method's value.
    """

    absolute: Interval
    relative: Interval


def paired_difference(ours: Mapping[str, Sample], theirs: Mapping[str, Sample]) -> Difference:
    """``ours - theirs`` of the unweighted mean over tasks, paired by task, seed and test row.

    A bootstrap at two levels, crossed (Owen 2007, "The pigeonhole bootstrap"): seeds are resampled, each with
    all its tasks, because a model trained on the mix answers all of them and single-task runs of a seed share
    their initialisation; and the test rows of each task are resampled, the same for both methods and for all
    seeds. The interval is about other seeds and other rows of these tasks; the tasks are no sample. The draws
    are the same in every call. With ten seeds the interval covers the truth in 91 % of cases where only seeds
    vary, and in 95 % or more where rows do; with five seeds in 83 % and 93 %.

    Args:
      ours, theirs: samples by task, with the same seeds and rows in the same order. If a value is not finite,
        neither are the intervals.
    """
    seeds = len(next(iter(ours.values())).values)
    drawn = _draws(seeds, 0)
    means = []
    for side in (ours, theirs):
        exact = np.mean([sample.mean for sample in side.values()])
        if not math.isfinite(exact):
            nothing = Interval(math.nan, math.nan, math.nan)
            return Difference(nothing, nothing)
        resampled = np.zeros(RESAMPLES)
        for place, sample in enumerate(side.values(), 1):
            rows = _draws(len(sample.weights), place)
            values, weights = sample.values.astype(np.float32), sample.weights.astype(np.float32)
            by_seed = values @ rows.T / (rows @ weights)  # [S, RESAMPLES]
            resampled += (drawn.T * by_seed).sum(axis=0) / seeds / len(side)
        means.append((exact, resampled))
    (our_mean, our_draws), (their_mean, their_draws) = means
    with np.errstate(divide="ignore", invalid="ignore"):  # a difference from zero has no percentage
        relative = _interval(np.divide(our_mean, their_mean) - 1, our_draws / their_draws - 1)
    return Difference(_interval(our_mean - their_mean, our_draws - their_draws), relative)


def _interval(mean: float, draws: Float[np.ndarray, " R"]) -> Interval:
    """The percentile interval of a mean."""
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(draws, [tail, 100 - tail])
    return Interval(float(mean), float(low), float(high))


@functools.lru_cache(maxsize=8)
def _draws(count: int, stream: int) -> Float[np.ndarray, "R count"]:
    """How often each of ``count`` items is drawn, in :data:`RESAMPLES` draws with replacement.

    Args:
      stream: number of the random stream; different streams are independent.
    """
    rng = np.random.default_rng([stream, count])
    return rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(np.float32)


def wilson_interval(correct: int, total: int) -> Interval:
    """The share of right answers and its score interval (Wilson 1927), for the limited number of test rows.
    It does not cover other seeds.

    Args:
      correct: number of right answers out of ``total``, which is at least 1.

    >>> [round(each, 3) for each in vars(wilson_interval(8, 10)).values()]
    [0.8, 0.49, 0.943]
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share, shrink = correct / total, 1 + z * z / total
    middle = (share + z * z / (2 * total)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    # At the edges the formula gives 0 and 1 up to rounding.
    low, high = 0.0 if correct == 0 else middle - half, 1.0 if correct == total else middle + half
    return Interval(share, low, high)
