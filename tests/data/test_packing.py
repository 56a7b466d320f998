"""Packing: every record once, none cut, few rows, the same rows every time."""

import numpy as np
import pytest

from milora_jax.data.batches import collate
from milora_jax.data.packing import Rows, pack
from milora_jax.data.tokens import Example


def example(prompt, response, first=10):
    return Example(np.arange(first, first + prompt + response, dtype=np.int32), prompt)


@pytest.mark.parametrize("seed", range(20))
def test_every_record_once_and_within_the_capacity(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(5, 300))
    lengths = rng.integers(1, capacity + 1, rng.integers(1, 400)).tolist()
    rows = pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in row) for row in rows]
    assert max(used) <= capacity
    assert rows == pack(lengths, capacity)
    assert all(row == sorted(row) for row in rows)
    # No two rows would fit into one: best fit opens a row only where nothing has room.
    assert len(rows) == 1 or sum(sorted(used)[:2]) > capacity
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // capacity) * 1.5 + 1


def test_rows_are_full_where_lengths_allow():
    assert pack([6, 4, 3, 7, 5, 5], 10) == [[0, 1], [2, 3], [4, 5]]


def test_a_record_that_fits_no_row_is_an_error():
    with pytest.raises(ValueError, match="a record of 9 tokens does not fit a row of 8"):
        pack([3, 9], 8)


def test_without_a_capacity_every_record_has_its_row():
    records = [example(2, 1), example(1, 1)]
    assert list(Rows(records, None)) == [[records[0]], [records[1]]]
    assert list(Rows(records, 5)) == [records]


def test_a_packed_row_keeps_its_records_apart():
    batch = collate([[example(2, 1), example(1, 2, first=50)], [example(1, 1)]], length=7, rows=3)
    np.testing.assert_array_equal(
        batch.tokens, [[10, 11, 12, 50, 51, 52, 0], [10, 11, 0, 0, 0, 0, 0], [0] * 7]
    )
    np.testing.assert_array_equal(batch.segment_ids, [[1, 1, 1, 2, 2, 2, 0], [1, 1] + [0] * 5, [0] * 7])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 0, 1, 2, 0], [0, 1] + [0] * 5, [0] * 7])
    np.testing.assert_array_equal(batch.prompt_mask, [[1, 1, 0, 1, 0, 0, 0], [1] + [0] * 6, [0] * 7])
    np.testing.assert_array_equal(batch.loss_mask, [[0, 0, 1, 0, 1, 1, 0], [0, 1] + [0] * 5, [0] * 7])
