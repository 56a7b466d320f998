"""Our own server as a judge of MT-Bench: a random model, whose verdicts nobody can read."""

import json

import pytest

from milora_jax.commands import mt_bench
from milora_jax.errors import UserError
from tests.serving.harness import KEYS

ANSWER = {
    "question_id": 121,
    "category": "coding",
    "questions": ["a"],
    "model_id": "mine",
    "choices": [{"index": 0, "turns": ["b"]}],
}


def test_it_is_asked_and_refuses_as_any_judge(served, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEYS["one"])
    answers, out = tmp_path / "answers.jsonl", tmp_path / "out.jsonl"
    answers.write_text(json.dumps(ANSWER) + "\n")
    given = ["judge", "--answers", str(answers), "--judge-url", f"{served[1]}/v1", "--judge-model", "math"]
    short, key = ["--max-tokens", "4"], ["--key-variable", "JUDGE_KEY"]
    with pytest.raises(UserError, match="refuses: status 401"):
        mt_bench.main([*given, *short, "--out", str(out)])
    with pytest.raises(UserError, match=r"refuses: status 400 \(This model has a context of 96 tokens"):
        mt_bench.main([*given, *short, *key, "--out", str(out)])
    assert not out.exists()
    monkeypatch.setattr("milora_jax.evaluation.judge.GRADE", "Grade.")  # the context is that small
    mt_bench.main([*given, *short, *key, "--out", str(out)])
    found = json.loads(capsys.readouterr().out)
    assert found == {"mode": "single", "score": None, "by_turn": {"1": None}, "unreadable": 1}
    assert json.loads(out.read_text())["judge"] == "math"
