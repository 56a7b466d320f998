"""Examples in files, rows made on access, and what reads records or orders rows without holding them all."""

import bisect
import itertools
import json

import numpy as np
import pytest

from milora_jax.data.batches import ORDER_STREAM, batch_rows
from milora_jax.data.dev_rows import HOLDOUT_STREAM, first_rows, holdout
from milora_jax.data.packing import Rows, pack
from milora_jax.data.records import Records, read_records
from milora_jax.data.rows import rows_of
from milora_jax.data.sources import Source
from milora_jax.data.stored import ANSWERS, INDEX, TOKENS, StoredExamples, writing
from milora_jax.data.tokens import Example, token_fingerprint
from milora_jax.errors import UserError


def example(rng, source):
    length = int(rng.integers(3, 30))
    answers = ((2, 3), (length - 1, length)) if rng.random() < 0.3 else ()
    tokens = rng.integers(0, 2**31 - 1, length).astype(np.int32)
    return Example(tokens, length // 2, source, int(rng.integers(0, 2)), answers)


@pytest.fixture
def examples():
    rng = np.random.default_rng(0)
    return [example(rng, "ab"[i % 2]) for i in range(50)]


def stored(folder, examples):
    with writing(folder, "x", "ab") as writer:
        for each in examples:
            writer.append(each)
    assert writer.count == len(examples)
    index, answers = ((folder / f"x{kind}").read_bytes() for kind in (INDEX, ANSWERS))
    return StoredExamples(folder / f"x{TOKENS}", index, answers, "ab")


def parts(example):
    return (
        example.tokens.tolist(),
        example.prompt_length,
        example.source,
        example.route_tokens,
        example.answers,
    )


def test_examples_are_read_as_they_were_written(tmp_path, examples):
    found = stored(tmp_path, examples)
    assert [parts(each) for each in found] == [parts(each) for each in examples]
    assert parts(found[-1]) == parts(examples[-1])
    assert [parts(each) for each in found[3:40:7]] == [parts(each) for each in examples[3:40:7]]
    assert found.lengths.tolist() == [len(each.tokens) for each in examples]
    assert found[0].tokens.dtype == np.int32
    assert token_fingerprint(found) == token_fingerprint(examples)
    with pytest.raises(IndexError):
        found[50]


@pytest.mark.parametrize("capacity", [None, 40])
def test_rows_are_the_same_of_files_and_of_lists(tmp_path, examples, capacity):
    files, lists = Rows(stored(tmp_path, examples), capacity), Rows(examples, capacity)
    assert len(files) == len(lists)
    assert files.prompts == lists.prompts == max(map(len, lists))
    assert files.lengths.tolist() == lists.lengths.tolist()
    assert files.lengths.tolist() == [sum(len(each.tokens) for each in row) for row in lists]
    for mine, other in zip(files, lists, strict=True):
        assert [parts(each) for each in mine] == [parts(each) for each in other]
    assert [[parts(each) for each in row] for row in files[2:5]] == [
        [parts(each) for each in row] for row in lists[2:5]
    ]


def pack_by_a_sorted_list(lengths, capacity):
    """The rule of ``pack``, written as it is said."""
    rows, free = [], []
    for record in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        found = bisect.bisect_left(free, (lengths[record], 0))
        room, row = free.pop(found) if found < len(free) else (capacity, len(rows))
        rows += [[]] if row == len(rows) else []
        rows[row].append(record)
        bisect.insort(free, (room - lengths[record], row))
    return sorted(sorted(row) for row in rows)


@pytest.mark.parametrize("seed", range(20))
def test_packing_puts_the_longest_into_the_fullest_row_with_room(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 60))
    lengths = rng.integers(1, capacity + 1, int(rng.integers(0, 200))).tolist()
    assert pack(lengths, capacity) == pack_by_a_sorted_list(lengths, capacity)


@pytest.mark.parametrize(("rows", "size"), [(50, 8), (7, 8), (3, 20), (64, 64), (1, 4)])
def test_the_order_is_that_of_whole_epochs(rows, size):
    epochs = (
        np.random.default_rng([9, ORDER_STREAM, epoch]).permutation(rows) for epoch in itertools.count()
    )
    order = np.concatenate(list(itertools.islice(epochs, 12 * size // rows + 1)))
    for step in (*range(12), 3, 0):
        np.testing.assert_array_equal(batch_rows(9, step, rows, size), order[step * size : (step + 1) * size])


def held_out_of_a_list(rows, share, seed, limit, fits):
    """The choice of ``holdout`` where all rows are at hand."""
    count = min(max(1, round(share * len(rows))), len(rows) - 1)
    order = np.random.default_rng([seed, HOLDOUT_STREAM]).permutation(len(rows))[:count].tolist()
    if limit:
        order = [i for i in order if fits(rows[i])][:limit] or order[:limit]
    return [row for i, row in enumerate(rows) if i in set(order)]


@pytest.mark.parametrize("limit", [0, 1, 3, 50])
@pytest.mark.parametrize("seed", range(3))
def test_rows_held_out_of_a_file_are_those_of_a_list(tmp_path, seed, limit):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"{i}", "output": "x"}) + "\n" for i in range(90)))
    source = Source("rows", str(path))
    rows = read_records(source)

    def fits(record):
        return int(record.instruction) % 9 == 4

    train, dev = holdout(Records((source,)), 0.7, seed, limit, fits)
    expected = held_out_of_a_list(rows, 0.7, seed, limit, fits)
    for _ in range(2):
        assert list(dev) == expected
        assert list(train) == [row for row in rows if row not in expected]
    assert list(first_rows(Records((source,)), limit, fits)) == list(first_rows(rows, limit, fits))


def test_a_long_file_is_read_line_by_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "\xc3\xa4\xe2\x80\xa8"}\n{"a": 3')
    rows = rows_of(str(path))
    assert next(rows) == ({"a": 1}, f"{path}:1")
    assert next(rows) == ({"a": "ä\u2028"}, f"{path}:4")
    with pytest.raises(UserError, match=r"rows\.jsonl:5: not JSON"):
        next(rows)
    path.write_bytes(b'{"a": 1}\n{"a": "\xc3"}\n')
    rows = rows_of(str(path))
    next(rows)
    with pytest.raises(UserError, match=r"rows\.jsonl:2: not UTF-8 text"):
        next(rows)
    path.write_text("\n")
    with pytest.raises(UserError, match="the data set is empty"):
        list(Records((Source("rows", str(path)),)))
