"""The figures of the base, which a run remembers."""

import dataclasses
import json

import pytest

from milora_jax.config import Config, DataSection, EvalSection, ModelSection
from milora_jax.console import Console
from milora_jax.data.records import Record
from milora_jax.errors import UserError
from milora_jax.evaluation import final, free_text
from milora_jax.evaluation.loss import Loss
from milora_jax.evaluation.score import Prediction, TaskScore, figures
from milora_jax.storage.files import read_json, write_json_atomic
from milora_jax.training.prepare import prepare_run
from tests.models import write_hf_directory

ROWS = [Record("ask", "", "It is one", "1")]
SENTENCES = [Record("ask", "", "There is a coffee shop.", "There is a coffee shop.")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_hf_directory(folder / "model")
    rows = [{"instruction": f"{i} + 1", "output": f"{i + 1}"} for i in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSection(train=str(folder / "rows.jsonl"), max_length=512)
    config = Config(model=ModelSection(path=str(folder / "model")), data=data)
    return dataclasses.replace(prepare_run(config, None, lambda line: None), tests={"sums": ROWS})


def base_figures(run, workdir):
    return final.evaluate_base(run, workdir, Console(silent=True), lambda: False)


@pytest.fixture
def scored(monkeypatch):
    """The scores of a base that is not asked, and how often it was."""
    asked = []
    answer = Prediction("sums", 0, "ask", "1", "1", "number", "1", False, True, None)
    text = free_text.text_measures(["It is one"], [["It is one"]])

    def score_all(*given):
        asked.append(given)
        return [TaskScore("sums", [answer], Loss(0.5, 1, 4, {"too_long": 1}), text)]

    monkeypatch.setattr(final, "_score_all", score_all)
    return {**figures(score_all()), "answers": {"sums": ["1"]}}, asked


def test_the_base_is_scored_once(run, tmp_path, scored):
    expected, asked = scored
    asked.clear()
    for _ in range(2):
        assert base_figures(run, tmp_path) == expected
    assert len(asked) == 1
    others = (
        {"tests": {"sums": SENTENCES}},
        {"base_fingerprint": "other"},
        {"model": dataclasses.replace(run.model, eos_ids=(3,))},
        {"config": dataclasses.replace(run.config, eval=EvalSection(limit=1))},
    )
    for count, other in enumerate(others, 2):
        assert base_figures(dataclasses.replace(run, **other), tmp_path) == expected
        assert len(asked) == count


def test_figures_of_an_earlier_version_are_completed(run, tmp_path, scored):
    expected, asked = scored
    path = tmp_path / final.BASE_SCORES_NAME
    base_figures(run, tmp_path)
    whole = read_json(path)
    write_json_atomic(path, {"key": whole["key"], "accuracy": whole["accuracy"]})
    asked.clear()
    assert base_figures(run, tmp_path) == expected
    assert len(asked) == 1
    assert read_json(path) == whole


def test_free_text_that_could_not_be_measured_is_told_before_anything_is_scored(monkeypatch):
    monkeypatch.setattr(free_text.importlib.util, "find_spec", lambda name: None)
    final.check_tests({"sums": ROWS}, print)
    with pytest.raises(UserError, match="test rows of free text need the package sacrebleu"):
        final.check_tests({"sums": ROWS, "sentences": SENTENCES}, print)
