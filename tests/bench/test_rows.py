"""The benchmark of many rows, on few."""

import json

import pytest

from milora_jax.bench.rows import Settings, measure, write_rows
from milora_jax.tiny import MODEL_DIR


def test_the_rows_are_the_same_every_time(tmp_path):
    for name in ("a", "b"):
        write_rows(tmp_path / f"{name}.jsonl", 50)
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert lines == (tmp_path / "b.jsonl").read_text().splitlines()
    assert len({json.loads(line)["input"] for line in lines}) == 50


@pytest.mark.thorough
def test_every_start_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv(
        "XLA_FLAGS", ""
    )  # each start is a process of its own, with the one device of this machine
    found = list(measure(Settings(model=str(MODEL_DIR), into=tmp_path, rows=200, steps=4, batch=4)))
    assert [report["start"] for report in found] == ["memory", "made", "opened"]
    for report in found:
        assert 0 < report["ready_s"] < report["first_step_s"]
        assert report["tok_s"] > 0
        assert report["ready_peak_bytes"] <= report["peak_memory_bytes"]
