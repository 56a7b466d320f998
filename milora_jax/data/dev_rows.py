"""Which rows are dev rows: held-out rows of the training data, or the first ones of a dev file.

Records are iterated and never indexed, so that they may be read from a file at every pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from milora_jax.data.records import Record, by_row
from milora_jax.errors import UserError

HOLDOUT_STREAM = 1
"""Separates the choice of held-out rows from every other use of the run's seed."""


def _always(record: Record) -> bool:
    return True


@dataclass(frozen=True)
class _Selected:
    """The records of the rows that are held out, or of all others."""

    records: Iterable[Record]
    held: frozenset[int]
    inside: bool

    def __iter__(self) -> Iterator[Record]:
        for i, row in enumerate(by_row(self.records)):
            if (i in self.held) == self.inside:
                yield from row


def holdout(
    records: Iterable[Record],
    share: float,
    seed: int,
    limit: int = 0,
    fits: Callable[[Record], bool] = _always,
) -> tuple[Iterable[Record], Iterable[Record]]:
    """Split off dev records, as a pure function of the records and the seed.

    The turns of a chat stay together, because the prompt of a later one holds the answer of an earlier one.

    Args:
      records: iterated several times, and again by each of the results.
      share: share of the rows; at least one row is held out, and at least one is left.
      limit: most rows that are held out; 0 means no limit.
      fits: whether a record can be a dev record; with ``limit`` only rows with such a record are held out.

    Returns:
      Training records in their order, and at least one dev record.
    """
    count = sum(1 for _ in by_row(records))
    if count < 2:
        raise UserError("one training row is too few to hold out dev rows: give data.dev")
    most = min(max(1, round(share * count)), count - 1)
    order = np.random.default_rng([seed, HOLDOUT_STREAM]).permutation(count)[:most].tolist()
    if limit:
        fitting = _fitting(records, order, 2 * limit, fits)
        order = list(itertools.islice(fitting, limit)) or order[:limit]
    held = frozenset(order)
    return _Selected(records, held, False), _Selected(records, held, True)


def _fitting(
    records: Iterable[Record], order: list[int], at_once: int, fits: Callable[[Record], bool]
) -> Iterator[int]:
    """The rows among ``order`` with a record that fits, in that order; ``at_once`` are looked up together."""
    for start in range(0, len(order), at_once):
        wanted = order[start : start + at_once]
        asked = set(wanted)
        rows = {i: row for i, row in enumerate(by_row(records)) if i in asked}
        yield from (i for i in wanted if any(map(fits, rows[i])))


def first_rows(
    records: Iterable[Record], limit: int, fits: Callable[[Record], bool] = _always
) -> Iterable[Record]:
    """The first ``limit`` rows with a record that fits, a chat with all of its turns; 0 means all."""
    if not limit:
        return records
    rows = (row for row in by_row(records) if any(map(fits, row)))
    found = [record for row in itertools.islice(rows, limit) for record in row]
    return found or list(itertools.islice(records, limit))
