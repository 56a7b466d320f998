"""Packing: several records in a row, which reduces padding.

Attention, positions, loss and routes stay per record (``types.Batch.segment_ids``): a packed row computes
what its records would compute in rows of their own. Otherwise a router would choose for one record by the
prompt of another.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

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
    free: list[tuple[int, int]] = []  # (room left, row), ascending
    for record in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        found = bisect.bisect_left(free, (lengths[record], 0))
        if found < len(free):
            room, row = free.pop(found)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(record)
        bisect.insort(free, (room - lengths[record], row))
    return sorted(sorted(row) for row in rows)


def in_rows(examples: Sequence[Example], capacity: int | None) -> list[list[Example]]:
    """Arrange encoded records in rows.

    Args:
      capacity: tokens of a row; None gives every record a row of its own.
    """
    if capacity is None:
        return [[example] for example in examples]
    return [[examples[i] for i in row] for row in pack([len(e.tokens) for e in examples], capacity)]
