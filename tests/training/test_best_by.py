"""``train.best_by``: the best step by the answers to the dev rows, in training, in files and after a stop."""

import json

import pytest

from milora_jax.config import TrainSection
from milora_jax.errors import Preempted, UserError
from milora_jax.run import train
from tests.training.runs import write_inputs

METRIC = """
values = iter({values})


def next_value(predictions, rows):
    assert len(predictions) == len(rows) == 3
    return [next(values)] * len(rows)


def length(predictions, rows):
    return [len(text) + 1 for text in predictions]
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("best_by")
    write_inputs(folder)
    return folder


def settings(folder, by, metric="", **more):
    rows = str(folder / "rows.jsonl")
    course = {"max_steps": 6, "eval_every": 2, "save_every": 2, "batch_size": 8, "coefficient_every": 3}
    return {
        "model": {"path": str(folder / "model")},
        "data": {
            "train": rows,
            "dev": f"mine={rows}",
            "max_length": 256,
            "dev_limit": 5,
            **more.pop("data", {}),
        },
        "adapter": {"rank": 2, "top_k_anneal": more.pop("anneal", 0.0)},
        "mesh": {"data": -1},
        "train": {**course, "learning_rate": 1e-2, "best_by": by, "patience": 0, **more.pop("train", {})},
        "eval": {"limit": 3, "max_new_tokens": 4, "metric": metric, **more.pop("eval", {})},
    }


def metric_file(folder, *values):
    path = folder / "mine.py"
    path.write_text(METRIC.format(values=list(values)))
    return f"{path}:next_value"


def evaluations(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "dev_answers" in line]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("by", "values", "patience", "best", "steps"),
    [
        ("metric", (0.25, 0.75, 0.5), 0, 4, 6),
        ("metric", (0.75, 0.75, 0.5), 0, 2, 6),
        ("lowest_metric", (0.5, 0.75, 0.25), 0, 6, 6),
        ("metric", (-0.5, -0.75, 0.0), 1, 2, 4),
    ],
    ids=["highest", "the first of equals", "lowest", "stops early"],
)
def test_the_metric_chooses_the_step_and_ends_the_run(inputs, tmp_path, by, values, patience, best, steps):
    given = settings(inputs, by, metric_file(tmp_path, *values), train={"patience": patience})
    result = train(given, tmp_path / "w", quiet=True)
    assert (result.best_step, result.steps) == (best, steps)
    assert [line["dev_answers"] for line in evaluations(tmp_path / "w")] == list(values[: steps // 2])
    assert result.summary["dev_answers"] == values[best // 2 - 1]
    (line,) = (line for line in evaluations(tmp_path / "w") if line["step"] == best)
    assert result.summary["dev_perplexity"] == line["dev_perplexity"]


@pytest.mark.thorough
def test_a_step_that_cannot_be_the_best_is_not_answered_for(inputs, tmp_path):
    """The routers choose more than k experts until step 3."""
    given = settings(inputs, "metric", metric_file(tmp_path, 0.5, 0.25), anneal=0.5)
    assert train(given, tmp_path / "w", quiet=True).best_step == 4
    assert [line["step"] for line in evaluations(tmp_path / "w")] == [4, 6]


@pytest.mark.thorough
def test_the_measure_in_training_is_that_of_the_stored_adapter(inputs, tmp_path, capsys):
    """Dev rows that are test rows as well; the answers of a batch do not depend on the layout."""
    metric = metric_file(tmp_path).replace("next_value", "length")
    rows = str(inputs / "rows.jsonl")
    given = settings(inputs, "metric", metric, data={"test": f"mine={rows}"})
    result = train(given, tmp_path / "w")
    assert result.summary["metric"]["adapter"]["mine"] == pytest.approx(result.summary["dev_answers"])
    assert f"(dev metric {result.summary['dev_answers']:.3f}, dev perplexity " in capsys.readouterr().out
    accurate = train(
        settings(inputs, "accuracy", data={"test": f"mine={rows}"}), tmp_path / "accuracy", quiet=True
    )
    assert accurate.summary["accuracy"]["adapter"]["mine"] == accurate.summary["dev_answers"]


@pytest.mark.thorough
def test_a_run_that_was_stopped_goes_on_with_its_best_and_refuses_another_measure(inputs, tmp_path):
    metric = metric_file(tmp_path).replace("next_value", "length")
    whole = train(settings(inputs, "lowest_metric", metric), tmp_path / "whole", quiet=True)
    calls = iter([False, False, False, True])
    with pytest.raises(Preempted):
        train(
            settings(inputs, "lowest_metric", metric),
            tmp_path / "w",
            quiet=True,
            stop=lambda: next(calls, False),
        )
    for change in ({"limit": 2}, {"max_new_tokens": 3}):
        with pytest.raises(UserError, match=r"holds another run: eval\.\w+ is \d there"):
            train(settings(inputs, "lowest_metric", metric, eval=change), tmp_path / "w", quiet=True)
    source = (tmp_path / "mine.py").read_text()
    (tmp_path / "mine.py").write_text(source.replace("+ 1", "+ 2"))
    with pytest.raises(UserError, match="metric of best_by changed since step 4"):
        train(settings(inputs, "lowest_metric", metric), tmp_path / "w", quiet=True)
    (tmp_path / "mine.py").write_text(source)
    resumed = train(settings(inputs, "lowest_metric", metric), tmp_path / "w", quiet=True)
    for name in ("best_step", "dev_answers", "dev_perplexity"):
        assert resumed.summary[name] == whole.summary[name]


@pytest.mark.parametrize(
    ("by", "more", "message"),
    [
        (
            "accuracy",
            {"data": {"dev": ""}},
            "data.dev is '': expected files: train.best_by 'accuracy' scores",
        ),
        ("metric", {}, "eval.metric is '': expected FILE.py:FUNCTION: train.best_by is 'metric'"),
        (
            "accuracy",
            {"data": {"dev": "{asked}"}},
            "the rows of dev source 'asked' have no answers to compare",
        ),
        ("accuracy", {"eval": {"max_new_tokens": 500}}, "prompt length of row 1 of 'mine', which is scored"),
        ("bleu", {}, "train.best_by is 'bleu': expected one of loss, accuracy, metric, lowest_metric"),
    ],
    ids=["no dev rows", "no metric", "no answers", "no room", "no such measure"],
)
def test_what_cannot_choose_is_refused_before_anything_is_written(inputs, tmp_path, by, more, message):
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"instruction": "say 1"}\n')
    given = settings(inputs, by, **more)
    given["data"]["dev"] = given["data"]["dev"].replace("{asked}", str(asked))
    with pytest.raises(UserError) as caught:
        train(given, tmp_path / "w", quiet=True)
    assert message in str(caught.value)
    assert not (tmp_path / "w").exists()


def test_dev_rows_are_looked_at_although_a_test_source_has_their_name(inputs, tmp_path):
    long = tmp_path / "long.jsonl"
    rows = [{"instruction": words, "output": "1", "answer": "1"} for words in ("say 1", "say 1 " * 300)]
    long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dev": f"mine={long}", "test": f"mine={inputs / 'rows.jsonl'}"}
    with pytest.raises(UserError, match="prompt length of row 2 of 'mine', which is scored"):
        train(settings(inputs, "accuracy", data={**data, "max_length": 500}), tmp_path / "w", quiet=True)


def test_preferences_are_chosen_by_their_loss():
    with pytest.raises(
        UserError, match=r"train\.best_by is 'accuracy': expected 'loss', the dev rows of 'dpo'"
    ):
        TrainSection(objective="dpo", best_by="accuracy")
