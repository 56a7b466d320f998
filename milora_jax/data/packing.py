"""Packing: several records in a row, which reduces padding.

Attention, positions, loss and routes stay per record (``types.Batch.segment_ids``): a packed row computes
what its records would compute in rows of their own. Otherwise a router would choose for one record by the
prompt of another.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from typing import SupportsIndex, overload

import numpy as np

from milora_jax.data.stored import StoredExamples
from milora_jax.data.tokens import Example


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Divide records among rows: the longest first, each into the fullest row with room for it.

    Best-fit decreasing needs at most 11/9 of the least possible number of rows, and 1 more (Johnson 1973).
    The division is a pure function of its arguments, so that a resumed run has the same rows.

    Args:
      lengths: lengths of the records, in tokens.
      capacity: tokens of a row; no record is longer.

    Returns:
      The numbers of each row's records, ascending; rows in the order of their first record.

    >>> pack([3, 5, 2, 4], 7)
    [[0, 3], [1, 2]]
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"a record of {max(lengths)} tokens does not fit a row of {capacity}")
    rows: list[list[int]] = []
    free: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the room left, a heap of rows
    rooms = 0  # bit r is set where there is a row with room r, so that the least room is a bit operation
    for record in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = rooms >> lengths[record]
        if fitting:
            room = lengths[record] + (fitting & -fitting).bit_length() - 1
            row = heapq.heappop(free[room])
            if not free[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(record)
        left = room - lengths[record]
        heapq.heappush(free[left], row)
        rooms |= 1 << left
    return sorted(sorted(row) for row in rows)


class Rows(Sequence[list[Example]]):
    """The rows of training or evaluation, each made of its examples when it is asked for.

    Attributes:
      examples: all examples, in memory or in a file.
      lengths: tokens of each row.
      prompts: Z, the largest number of prompts in a row.
      answers: A, the number of consecutive examples that are answers to one prompt.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        capacity: int | None,
        answers: int = 1,
        chosen: np.ndarray | None = None,
    ) -> None:
        """Arrange examples in rows by their lengths alone.

        Args:
          capacity: tokens of a row; None gives every prompt a row of its own.
          answers: consecutive examples that are answers to one prompt, and share a row.
          chosen: numbers of the prompts that are arranged, some perhaps several times; None is each once.
        """
        self.examples, self.answers = examples, answers
        if isinstance(examples, StoredExamples):
            lengths = examples.lengths
        else:
            lengths = np.array([len(example.tokens) for example in examples], np.int64)
        if answers > 1:
            lengths = lengths.reshape(-1, answers).sum(axis=1)
        lengths = lengths if chosen is None else lengths[chosen]
        if capacity is None:
            self._members: range | np.ndarray = range(len(lengths)) if chosen is None else chosen
            self._starts: range | np.ndarray = range(len(lengths) + 1)
            self.lengths, self.prompts = lengths, min(1, len(lengths))
            return
        packed = pack(lengths.tolist(), capacity)
        placed = np.fromiter(itertools.chain.from_iterable(packed), np.int64, len(lengths))
        self._members = placed if chosen is None else chosen[placed]
        starts = self._starts = np.cumsum([0, *map(len, packed)])
        self.lengths = np.add.reduceat(lengths[placed], starts[:-1])
        self.prompts = max(map(len, packed), default=0)

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, place: SupportsIndex) -> list[Example]: ...
    @overload
    def __getitem__(self, place: slice) -> list[list[Example]]: ...
    def __getitem__(self, place: SupportsIndex | slice) -> list[Example] | list[list[Example]]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        row = range(len(self))[place]
        prompts = self._members[self._starts[row] : self._starts[row + 1]]
        if self.answers == 1:
            return [self.examples[int(i)] for i in prompts]
        places = (int(i) * self.answers + answer for i in prompts for answer in range(self.answers))
        return [self.examples[place] for place in places]
