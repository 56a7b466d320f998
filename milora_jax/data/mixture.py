"""Weighted mixtures: how often an epoch has each example, so that every source has its share of them.

An epoch is the shortest in which every example stands at least once, as with ``all_exhausted`` of
``datasets.interleave_datasets``: the source with the most examples for its weight has each of them once, and
the examples of the others are repeated. It is the same in every epoch, so that what is packed and how many
steps a run has do not depend on the epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from milora_jax.data.stored import StoredExamples
from milora_jax.data.tokens import Example
from milora_jax.errors import UserError

MIXTURE_STREAM = 3
"""Separates the choice of the examples that are repeated once more from every other use of the seed."""

LARGEST_EPOCH = 2**27
"""Examples of the longest epoch of a mixture; their numbers take half a gigabyte."""


def source_numbers(examples: Sequence[Example], names: Sequence[str]) -> np.ndarray:
    """The source of each example as a place in ``names``, which holds all of them."""
    places = {name: place for place, name in enumerate(names)}
    if isinstance(examples, StoredExamples):
        return examples.source_numbers(places)
    return np.fromiter((places[example.source] for example in examples), np.int32, len(examples))


def mixture(sources: np.ndarray, weights: Mapping[str, float], seed: int) -> np.ndarray:
    """The examples of an epoch, as a pure function of the arguments.

    Every example of a source stands in it equally often, or some of them, drawn by the seed, once more.

    Args:
      sources: the source of each example, as a place in ``weights``.
      weights: the weight of each source, above 0; only their ratios count.

    Returns:
      Numbers of examples, int32: each once in their order, then those that are repeated in theirs, and so on.

    Raises:
      UserError: a source has no example, or the epoch is too long.
    """
    values = np.array([*weights.values()], float)
    values /= values.max()  # so that no quotient is out of range
    sizes = np.bincount(sources, minlength=len(weights))
    for name, size in zip(weights, sizes, strict=True):
        if not size:
            raise UserError(f"data.weights: source {name!r} has no training row left, expected at least one")
    with np.errstate(all="ignore"):  # a weight may be too small for a quotient
        each = (sizes / values).max() * values
    if not each.sum() <= LARGEST_EPOCH:
        raise UserError(
            f"data.weights: an epoch with every row has {each.sum():.3g} examples, expected at most "
            f"{LARGEST_EPOCH}: bring the weights closer to {', '.join(map(str, sizes))}, the numbers of rows"
        )
    counts = np.zeros(len(sources), np.int64)
    for place, (size, wanted) in enumerate(zip(sizes, np.maximum(np.rint(each), sizes), strict=True)):
        whole, rest = divmod(int(wanted), int(size))
        own = np.flatnonzero(sources == place)
        counts[own] = whole
        drawn = np.random.default_rng([seed, MIXTURE_STREAM, place]).permutation(size)[:rest]
        counts[own[drawn]] += 1
    # Copies far apart, so that packing does not put them into one row where others are as long.
    rounds = (np.flatnonzero(counts > done).astype(np.int32) for done in range(int(counts.max())))
    return np.concatenate([*rounds])
