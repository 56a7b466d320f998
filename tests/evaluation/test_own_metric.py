"""``eval.metric``: a measure of the user's own, and one line for whatever is wrong with it."""

import dataclasses
import json

import pytest

from milora_jax.commands import evaluation
from milora_jax.config import Config, DataSection, EvalSection, ModelSection
from milora_jax.console import Console
from milora_jax.data.chat import Message
from milora_jax.data.records import Record
from milora_jax.errors import UserError
from milora_jax.evaluation import final
from milora_jax.evaluation.own_metric import read_metric, row_of
from milora_jax.evaluation.report import figures_table, score_table
from milora_jax.evaluation.score import Prediction, TaskScore, figures
from milora_jax.run import train
from milora_jax.training.prepare import prepare_run
from tests.models import write_hf_directory

RECORDS = [Record("a", "", "one two", "one"), Record("b", "", "three", "three", where="rows.jsonl:2")]

METRICS = '''import math


def words(predictions, rows):
    """One number for all."""
    return sum(len(text.split()) for text in predictions) / len(rows)


def overlap(predictions, rows):
    """One number for each row."""
    return [len(set(t.split()) & set(r["output"].split())) for t, r in zip(predictions, rows)]


def raises(predictions, rows):
    return rows[5]["output"]


def undefined(predictions, rows):
    return [1.0, math.nan]


def too_many(predictions, rows):
    return [1.0] * 3


def nothing(predictions, rows):
    pass


def texts(predictions, rows):
    return ["a", "b"]


there = 3
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("metrics") / "mine.py"
    path.write_text(METRICS)
    return path


def value(file, name):
    return read_metric(f"{file}:{name}").value("told", ["one two three", "three"], RECORDS)


def test_it_is_a_number_for_all_rows_or_the_mean_over_them(file):
    assert value(file, "words") == 2.0
    assert value(file, "overlap") == 1.5
    assert read_metric("") is None


def test_a_row_has_what_the_file_of_rows_has():
    chat = Record("hi", "", "ho", "ho", (Message("user", "hi"),), references=("ho", "hey"))
    assert row_of(chat) == {
        "instruction": "hi",
        "input": "",
        "output": "ho",
        "answer": "ho",
        "references": ["ho", "hey"],
        "messages": [{"role": "user", "content": "hi"}],
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "mine.py:15: task 'told': IndexError: list index out of range"),
        (
            "undefined",
            "mine.py:undefined gives nan for rows.jsonl:2 of task 'told': expected a finite number",
        ),
        (
            "too_many",
            "mine.py:too_many gives [3] numbers for task 'told': expected one, or one for each of its 2",
        ),
        ("nothing", "mine.py:nothing gives nan for task 'told': expected a finite number"),
        ("texts", "mine.py: task 'told': ValueError: could not convert string"),
    ],
)
def test_what_gives_no_number_is_one_line(file, name, message):
    with pytest.raises(UserError) as caught:
        value(file, name)
    assert str(caught.value).startswith("eval.metric: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{folder}/none.py:words", "no such file as"),
        ("{folder}/mine.py:word", "mine.py has no function 'word'"),
        ("{folder}/mine.py:there", "mine.py has no function 'there'"),
        ("{folder}/torn.py:words", "torn.py: SyntaxError"),
        ("{folder}/raises.py:words", "raises.py:2: ZeroDivisionError"),
    ],
)
def test_a_run_with_a_metric_that_cannot_be_loaded_is_refused_before_anything(given, message, file, tmp_path):
    (file.parent / "torn.py").write_text("def words(:\n")
    (file.parent / "raises.py").write_text("\n1 / 0\n")
    metric = given.format(folder=file.parent)
    with pytest.raises(UserError, match=r"eval\.metric") as caught:
        train({"eval": {"metric": metric}, "model": {"path": "nowhere"}}, tmp_path / "w")
    assert message in str(caught.value)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("given", ["words", "mine.py", "mine.py:", "mine.txt:words", "mine.py:a b"])
def test_another_form_is_refused(given):
    with pytest.raises(UserError, match=r"eval\.metric is '.*': expected FILE\.py:FUNCTION"):
        EvalSection(metric=given)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_hf_directory(folder / "model")
    rows = [{"instruction": f"{i} + 1", "output": f"{i + 1}"} for i in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSection(train=str(folder / "rows.jsonl"), max_length=512)
    config = Config(model=ModelSection(path=str(folder / "model")), data=data)
    return dataclasses.replace(prepare_run(config, None, lambda line: None), tests={"told": RECORDS})


def answered(texts):
    return [
        Prediction("told", row, record.instruction, record.answer, text, "text", text, False, False, None)
        for row, (record, text) in enumerate(zip(RECORDS, texts, strict=True))
    ]


@pytest.fixture
def scored(monkeypatch):
    """How often the base was asked."""
    asked = []

    def score_all(*given):
        asked.append(given)
        return [TaskScore("told", answered(["one two three", "three"]))]

    monkeypatch.setattr(final, "_score_all", score_all)
    return asked


def base_figures(run, workdir, metric):
    config = dataclasses.replace(run.config, eval=EvalSection(metric=metric))
    changed = dataclasses.replace(run, config=config)
    return final.evaluate_base(changed, workdir, Console(silent=True), lambda: False, read_metric(metric))


def test_the_base_is_asked_again_for_another_metric_or_another_content_of_its_file(run, scored, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(METRICS)
    plain = base_figures(run, tmp_path, "")
    assert "metric" not in plain
    for name, expected in (("words", 2.0), ("overlap", 1.5)):
        for _ in range(2):
            assert base_figures(run, tmp_path, f"{path}:{name}") == {**plain, "metric": {"told": expected}}
    assert len(scored) == 3
    path.write_text(METRICS.replace("return [len", "return [2 * len"))
    assert base_figures(run, tmp_path, f"{path}:overlap")["metric"] == {"told": 3.0}
    assert len(scored) == 4


def test_the_answers_are_kept_if_the_metric_fails(run, scored, file, tmp_path):
    with pytest.raises(
        UserError, match="IndexError: list index out of range; the answers are kept in "
    ) as caught:
        base_figures(run, tmp_path, f"{file}:raises")
    kept = tmp_path / "base_predictions.jsonl"
    assert str(caught.value).endswith(str(kept))
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [line["generated"] for line in lines] == ["one two three", "three"]


def test_the_tables_have_it_and_have_none_without(scored):
    plain = TaskScore("told", answered(["a", "b"]))
    own = dataclasses.replace(plain, metric=1.23456)
    assert "metric" not in figures([plain])
    assert "metric" not in score_table([plain])
    assert "metric" not in figures_table(figures([plain]), figures([plain]))
    assert figures([own])["metric"] == {"told": 1.23456}
    assert score_table([own]).splitlines()[1].endswith("  1.235")
    *_, last = figures_table(figures([dataclasses.replace(own, metric=0.5)]), figures([own])).splitlines()
    assert last.split() == ["told", "0.5", "1.235"]


@pytest.mark.thorough
def test_the_command_measures_answers_and_loses_none(run, file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"add {i}", "output": f"It is {i}"} for i in range(3)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["--base", run.config.model.path, "--data", "sums.jsonl", "--max-new-tokens", "3"]
    with pytest.raises(
        UserError, match="list index out of range; the answers are kept in evaluation-base-sums"
    ):
        evaluation.main([*asked, "--metric", f"{file}:raises"])
    answers = [
        json.loads(line) for line in (tmp_path / "evaluation-base-sums.jsonl").read_text().splitlines()
    ]
    capsys.readouterr()
    evaluation.main([*asked, "--metric", f"{file}:words"])
    said = capsys.readouterr()
    assert "3 of 3 rows are in evaluation-base-sums.jsonl already" in said.err
    found = json.loads(said.out)
    expected = sum(len(answer["generated"].split()) for answer in answers) / 3
    assert found["metric"] == {"sums": pytest.approx(expected)}
    assert found["metric_function"] == f"{file}:words"
    evaluation.main(asked)
    assert "metric" not in json.loads(capsys.readouterr().out)
