"""The benchmark of starts, on the embedded model."""

import pytest

from milora_jax.bench.startup import Settings, measure
from milora_jax.errors import UserError
from milora_jax.tiny import MODEL_DIR


@pytest.mark.thorough
def test_every_command_is_started_cold_and_warm(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # each start has the one device of this machine
    settings = Settings(model=str(MODEL_DIR), into=tmp_path, repeats=1, context=64)
    found = {report["start"]: report for report in measure(settings)}
    results = {
        "train": {"first_step_s"},
        "serve": {"ready_s", "first_answer_s"},
        "generate": {"first_token_s"},
    }
    assert {name: set(report["cold"]) - {"cpu_s"} for name, report in found.items()} == results
    for report in found.values():
        assert "bench" in report["command"]
        assert report["warm"].keys() == report["cold"].keys() == report["ratio"].keys()
        assert all(0 < each < 600 for kind in ("cold", "warm") for each in report[kind].values())
        assert report["warm"]["cpu_s"] < report["cold"]["cpu_s"], "programs are kept"
    serve = found["serve"]["warm"]
    assert serve["ready_s"] <= serve["first_answer_s"]


@pytest.mark.thorough
def test_a_command_that_fails_is_one_line(tmp_path):
    settings = Settings(model=str(tmp_path), into=tmp_path, command=("generate",), repeats=1)
    with pytest.raises(UserError, match=r"the command ended with 2: error: .*no usable tokenizer"):
        list(measure(settings))


@pytest.mark.thorough
def test_a_command_that_never_answers_is_ended(tmp_path):
    settings = Settings(
        model=str(MODEL_DIR), into=tmp_path, command=("serve",), repeats=1, context=64, seconds=0.5
    )
    with pytest.raises(UserError, match=r"no ready_s within --seconds 0\.5"):
        list(measure(settings))
