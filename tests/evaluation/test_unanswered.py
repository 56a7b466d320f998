"""A test set without gold answers has predictions and no accuracy."""

import dataclasses
import json

import pytest

from milora_jax.columns import parse_columns
from milora_jax.commands import evaluation
from milora_jax.config import Config, DataSection, EvalSection, ModelSection
from milora_jax.data.chat import Message
from milora_jax.data.records import Record, read_records
from milora_jax.data.sources import parse_sources
from milora_jax.errors import UserError
from milora_jax.evaluation.extraction import RULES
from milora_jax.evaluation.final import check_tests
from milora_jax.evaluation.report import figures_table, loss_notes, score_table
from milora_jax.evaluation.score import TaskScore, figures, judge
from milora_jax.generation.text import Answer, Continuation
from milora_jax.run import train
from tests.models import write_hf_directory

ANSWER = Answer((Continuation("It is 3", (4,), "stop"),), None)


def read(folder, *rows, columns="", scored=True):
    (folder / "told.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (source,) = parse_sources(str(folder / "told.jsonl"), columns)
    return read_records(source, scored=scored)


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ({"instruction": "a", "input": "b"}, Record("a", "b", "", "")),
        ({"instruction": "a", "output": "", "id": 3}, Record("a", "", "", "")),
        ({"instruction": "a", "answer": None, "references": []}, Record("a", "", "", "")),
        ({"question": "a"}, Record("a", "", "", "")),
        (
            {"instruction": "a", "system": "be"},
            Record("a", "", "", "", (Message("system", "be"), Message("user", "a"))),
        ),
        ({"messages": [{"role": "user", "content": "a"}]}, Record("a", "", "", "", (Message("user", "a"),))),
        (
            {"conversations": [{"from": "human", "value": "a"}]},
            Record("a", "", "", "", (Message("user", "a"),)),
        ),
    ],
)
def test_a_question_without_an_answer_is_read_for_scoring_only(row, record, tmp_path):
    assert read(tmp_path, row, row) == [record] * 2
    assert not record.answered
    with pytest.raises(UserError, match=r"told.jsonl:1: "):
        read(tmp_path, row, scored=False)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"instruction": "a"}, {"instruction": "b", "output": "c"}],
            "told.jsonl:2: the row has an answer, or a field that is none of a question, and the first row",
        ),
        (
            [{"instruction": "a", "output": "c"}, {"instruction": "b"}],
            "told.jsonl:2: field 'output' holds nothing",
        ),
        ([{"instruction": "a", "target": "c"}], "told.jsonl:1: field 'output' holds nothing, expected text"),
        ([{"input": "a"}], "told.jsonl:1: field 'instruction' holds nothing"),
        ([{"instruction": "a", "output": "  "}], "told.jsonl:1: field 'output' is empty"),
        ([{"messages": [{"role": "user", "content": "a"}], "answer": "b"}], "told.jsonl:1: "),
    ],
)
def test_a_mix_and_a_field_that_may_be_the_answer_are_refused(rows, message, tmp_path):
    with pytest.raises(UserError) as caught:
        read(tmp_path, *rows)
    assert message in str(caught.value)


def test_a_column_that_is_left_out_is_no_answer(tmp_path):
    assert parse_columns("target=")
    assert read(tmp_path, {"instruction": "a", "target": "c"}, columns="target=") == [Record("a", "", "", "")]


def test_figures_leave_out_what_has_no_answers():
    known, asked = Record("a", "", "It is 3", "3"), Record("a", "", "", "")
    sums = TaskScore("sums", [judge("sums", 0, known, RULES["number"], ANSWER)])
    told = TaskScore("told", [judge("told", 0, asked, RULES["text"], ANSWER)])
    (line,) = told.predictions
    assert (line.gold, line.correct, line.generated, line.unread) == (None, None, "It is 3", False)
    assert (told.accuracy, told.interval, sums.accuracy) == (None, None, 1.0)
    both = figures([told, sums])
    assert both["accuracy"] == {"sums": 1.0, "mean": 1.0}
    assert both["without_answers"] == ["told"]
    assert figures([told])["accuracy"] == {}
    assert "without_answers" not in figures([sums])
    table = [row.split() for row in figures_table(both, both).splitlines()]
    assert ["told", *["-"] * 6] in table
    assert ["mean", "100.0%", "100.0%"] in table
    assert ["mean"] in [row.split() for row in figures_table(figures([told]), figures([told])).splitlines()]
    assert loss_notes(both)[0] == "note: told: its rows have no answers, so it has no accuracy"
    lines = score_table([told, sums]).splitlines()
    assert lines[1].split()[:4] == ["told", "-", "-", "1"]
    assert lines[-1].split() == ["mean", "100.0%"]
    assert "mean" not in score_table([told, dataclasses.replace(told, task="more")])


def test_rows_named_like_a_task_are_told_to_have_no_answers():
    said = []
    check_tests({"boolq": [Record("a", "", "", "")]}, said.append)
    assert said == ["note: boolq: its 1 rows have no answers, so there are predictions and no accuracy"]


@pytest.mark.thorough
def test_a_run_and_the_command_predict_and_say_so(tmp_path, capsys, monkeypatch):
    write_hf_directory(tmp_path / "model")
    rows = [{"instruction": f"{i} + 1", "output": f"{i + 1}"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = "".join(json.dumps({"instruction": row["instruction"]}) + "\n" for row in rows[:3])
    (tmp_path / "asked.jsonl").write_text(asked)
    settings = Config(
        model=ModelSection(path=str(tmp_path / "model")),
        data=DataSection(
            train=str(tmp_path / "rows.jsonl"),
            dev=str(tmp_path / "rows.jsonl"),
            test=str(tmp_path / "asked.jsonl"),
            max_length=360,
        ),
        eval=EvalSection(max_new_tokens=3, batch_size=8),
    ).to_dict()
    settings["adapter"] = {"method": "lora", "rank": 2}
    settings["train"] |= {"max_steps": 1, "batch_size": 8}
    result = train(settings, tmp_path / "w")
    assert "note: asked: its rows have no answers, so it has no accuracy" in capsys.readouterr().out
    assert result.accuracy == {}
    assert result.summary["accuracy"] == {"base": {}, "adapter": {}}
    assert result.summary["without_answers"] == ["asked"]
    lines = [json.loads(line) for line in result.predictions.read_text().splitlines()]
    assert [(line["instruction"], line["gold"], line["correct"]) for line in lines] == [
        (row["instruction"], None, None) for row in rows[:3]
    ]
    evaluation.main(["--workdir", str(tmp_path / "w")])
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (found["accuracy"], found["interval"], found["without_answers"]) == ({}, {}, ["asked"])
    assert "right" not in said.err.splitlines()[0]
    again = [json.loads(line) for line in (tmp_path / "w" / "evaluation.jsonl").read_text().splitlines()]
    assert again == lines
    evaluation.main(["--workdir", str(tmp_path / "w")])
    assert json.loads(capsys.readouterr().out) == found
