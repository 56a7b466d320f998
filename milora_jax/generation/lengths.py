"""Groups of prompts that are decoded together because they need about as many cache positions.

A decode step reads the weights once, and the cache of every batch slot as far as the longest prompt of the
batch with its answer needs it. One long prompt makes every short one beside it pay for its length; a batch of
its own makes it pay for the weights alone. Which is less follows from the bytes.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from milora_jax.base.modules import Base
from milora_jax.model_config import ModelConfig

SMALLEST_BUCKET = 32


def bucket_of(length: int, limit: int, smallest: int = SMALLEST_BUCKET) -> int:
    """Return the length to which a prompt is padded: ``smallest``, doubled until it fits, at most ``limit``.

    It depends on the prompt alone, so that there are few programs and a prompt always gets the same one.

    >>> [bucket_of(n, 1000) for n in (1, 32, 33, 900)]
    [32, 32, 64, 1000]
    """
    bucket = smallest
    while bucket < length:
        bucket *= 2
    return min(bucket, limit)


LEAST_GAIN = 0.1
"""Share of the whole that one more group has to save, because it is one more program to compile."""


@dataclass(frozen=True)
class Need:
    """The cache positions, samples and decode steps that a prompt needs.

    Attributes:
      positions: cache positions that it may fill.
      samples: continuations.
      steps: decode steps of the longest of them.
    """

    positions: int
    samples: int
    steps: int


def position_cost(base: Base, config: ModelConfig) -> float:
    """Return the bytes that a step reads for one cache position of a slot, over those of the weights."""
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(base))
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * base.dtype.itemsize / weights


def groups_by_length(needs: Sequence[Need], rows: int, cost: float) -> list[list[int]]:
    """Split prompts into groups that are decoded one after another, each with a cache of its own length.

    The lengths of two groups lie in different powers of two, so there are few groups, and few programs,
    however many lengths there are.

    Args:
      rows: most continuations that are decoded together.
      cost: cost of a cache position, by :func:`position_cost`.

    Returns:
      Places in ``needs``, the shortest first.

    >>> short, long = Need(100, 1, 64), Need(2100, 1, 64)
    >>> groups_by_length([long, *[short] * 8], rows=8, cost=1e-4)
    [[1, 2, 3, 4, 5, 6, 7, 8], [0]]
    >>> groups_by_length([long, short], rows=8, cost=1e-4)
    [[1, 0]]
    """
    order = sorted(range(len(needs)), key=lambda i: needs[i].positions)
    runs = [
        list(run) for _, run in itertools.groupby(order, lambda i: bucket_of(needs[i].positions, sys.maxsize))
    ]
    least = LEAST_GAIN * _cost([needs[i] for i in order], rows, cost)
    # The cheapest way to group the first so many runs, and what it costs.
    best: list[tuple[float, list[list[int]]]] = [(0.0, [])]
    for end in range(1, len(runs) + 1):
        found = []
        for start in range(end):
            group = [i for run in runs[start:end] for i in run]
            before, groups = best[start]
            total = before + _cost([needs[i] for i in group], rows, cost) + (least if start else 0.0)
            found.append((total, [*groups, group]))
        best.append(min(found, key=lambda each: each[0]))
    return best[-1][1]


def _cost(group: Sequence[Need], rows: int, cost: float) -> float:
    """What decoding a group reads, in units of the weights."""
    if not group:
        return 0.0
    width = min(rows, sum(need.samples for need in group))
    in_turn = sum(need.samples * need.steps for need in group) / width
    steps = max(in_turn, *(need.steps for need in group))
    return steps * (1.0 + width * cost * max(need.positions for need in group))
