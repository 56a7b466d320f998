"""The predictions file: appended, taken up again, refused where it is of something else."""

import dataclasses
import json
import os

import pytest

from milora_jax.errors import UserError
from milora_jax.evaluation.predictions import PredictionFile, batches_by_length, result_path
from milora_jax.evaluation.score import Prediction, TaskScore, prediction_line, write_predictions

SETTINGS = {"beams": 1, "tasks": {"sums": {"records": "a" * 64}, "more": {"records": "b" * 64}}}
BATCHES = [*batches_by_length("sums", [9, 3, 5, 1, 7], 2), *batches_by_length("more", [2, 1], 2)]


def prediction(task, row):
    correct = row % 2 == 0
    route = [{"Q": 1.0, "D": 0.25}, {"K": 1.0}]
    return Prediction(task, row, f"ask {row}", "1", f"é {row}", "number", "1", False, correct, route)


def answers(batch):
    return [prediction(batch.task, row) for row in batch.rows]


def opened(path, settings=SETTINGS, batches=BATCHES, fresh=False):
    return PredictionFile(path, settings, batches, fresh)


def write_batches(path, count):
    """What an evaluation leaves that ends after ``count`` batches."""
    with opened(path) as file:
        for batch in BATCHES[:count]:
            file.append(answers(batch))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "evaluation.jsonl"


def finished(path):
    """The bytes of an evaluation that goes on to its end."""
    with opened(path) as file:
        for batch in file.missing:
            file.append(answers(batch))
        file.finish({"accuracy": 1})
    return path.read_bytes(), result_path(path).read_bytes()


@pytest.mark.parametrize("done", range(len(BATCHES) + 1))
def test_what_is_there_is_not_asked_again(path, tmp_path, done):
    write_batches(path, done)
    with opened(path) as file:
        assert file.missing == BATCHES[done:]
        assert len(file.done) == sum(len(batch.rows) for batch in BATCHES[:done])
    assert finished(path) == finished(tmp_path / "undisturbed.jsonl")


def test_a_kill_at_any_byte_costs_at_most_the_batch_under_way(path):
    write_batches(path, len(BATCHES))
    whole = path.read_bytes()
    lines = [len(line) for line in whole.splitlines(keepends=True)]
    ends, start = [0], 0
    for batch in BATCHES:
        start, last = start + len(batch.rows), start
        ends.append(ends[-1] + sum(lines[last:start]))
    for cut in range(0, len(whole) + 1, 7):
        path.write_bytes(whole[:cut])
        with opened(path) as file:
            there = sum(end <= cut for end in ends) - 1
            assert file.missing == BATCHES[there:]
        assert path.read_bytes() == whole[: ends[there]]


def test_a_finished_file_is_in_the_order_of_the_rows_and_has_its_result_beside_it(path):
    finished(path)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["task"], row["row"]) for row in found] == [("sums", i) for i in range(5)] + [
        ("more", 0),
        ("more", 1),
    ]
    assert json.loads(result_path(path).read_text()) == {"settings": SETTINGS, "result": {"accuracy": 1}}
    with opened(path) as file:
        assert not file.missing
        assert [score.accuracy for score in file.scores()] == [3 / 5, 1 / 2]


def test_a_line_holds_a_prediction_whole(path):
    write_predictions(path, [TaskScore("sums", [prediction("sums", 0)])])
    assert path.read_text() == prediction_line(prediction("sums", 0)) + "\n"
    assert Prediction(**json.loads(path.read_text())) == prediction("sums", 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**SETTINGS, "beams": 3}, "was made with beams 1, this command has 3: give --fresh"),
        (
            {**SETTINGS, "tasks": {**SETTINGS["tasks"], "more": {"records": "c" * 64}}},
            "made with tasks.more.records bbbbbbbbbbbb..., this command has cccccccccccc...: give --fresh",
        ),
        (
            {**SETTINGS, "dtype": "float32"},
            'was made with dtype null, this command has "float32": give --fresh',
        ),
    ],
)
def test_other_settings_are_refused_and_nothing_is_lost(path, settings, message):
    write_batches(path, 2)
    before = path.read_bytes()
    with pytest.raises(UserError) as caught, opened(path, settings):
        pass
    assert message in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("torn", [b"", b'{"task": "su'])
def test_a_file_without_a_whole_line_is_of_no_settings_yet(path, torn):
    """Stopped before its settings were written, or killed in its first batch: it holds nothing to lose."""
    path.write_bytes(torn)
    with opened(path) as file:
        assert file.missing == BATCHES
    with opened(path, settings={**SETTINGS, "beams": 2}) as file:
        assert file.missing == BATCHES


def test_fresh_begins_again(path):
    write_batches(path, 2)
    with opened(path, {**SETTINGS, "beams": 3}, fresh=True) as file:
        assert file.missing == BATCHES
    with opened(path, {**SETTINGS, "beams": 3}) as file:
        assert file.missing == BATCHES
    path.write_bytes(b"no predictions\n")
    with opened(path, fresh=True) as file:
        assert file.missing == BATCHES


def test_a_file_that_somebody_else_has_written_is_refused(path):
    path.write_text("{}\n")
    with pytest.raises(
        UserError, match=r"without evaluation\.result\.json, so its settings are unknown: give"
    ):
        opened(path).__enter__()
    path.unlink()
    write_batches(path, 2)
    whole = path.read_text().splitlines(keepends=True)
    cases = {
        "holds other rows than this command has written": [whole[1], whole[0]],
        "evaluation.jsonl:1: not a prediction of this version": ["{}\n", *whole],
        "evaluation.jsonl:2: not a prediction of this version": [whole[0], "torn\n", *whole[1:]],
    }
    for message, lines in cases.items():
        path.write_text("".join(lines))
        with pytest.raises(UserError, match="--fresh") as caught:
            opened(path).__enter__()
        assert message in str(caught.value)
        assert path.read_text() == "".join(lines)


def test_of_two_evaluations_the_second_is_refused(path):
    with opened(path) as file:
        file.append(answers(BATCHES[0]))
        with pytest.raises(UserError, match="is being written by another evaluation"):
            opened(path, fresh=True).__enter__()
        file.append(answers(BATCHES[1]))
    with opened(path) as file:
        assert file.missing == BATCHES[2:]


def test_a_batch_is_on_the_disk_when_append_returns(path, monkeypatch):
    synced = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(path.read_bytes()), sync(descriptor)))
    with opened(path) as file:
        synced.clear()
        file.append(answers(BATCHES[0]))
        assert synced == [path.read_bytes()] != [b""]


def test_an_older_line_without_a_field_is_refused(path):
    write_batches(path, 1)
    row = dataclasses.asdict(prediction("sums", 3))
    del row["route"]
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="not a prediction of this version"):
        opened(path).__enter__()
