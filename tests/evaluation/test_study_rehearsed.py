"""The whole study in little: every method, every comparison, killed and taken up again."""

import json
import subprocess
import time

import pytest

from milora_jax.adapters.registry import METHODS
from milora_jax.evaluation.study.forced import FORCED
from milora_jax.evaluation.study.reports import COMPARISONS
from tests.evaluation.commands import start_study, study_command


def results(directory):
    """Of finished cells; not looked for any deeper, where a study at work takes folders away."""
    return list((directory / "cells").glob("*/result.json"))


def unfinished(directory):
    """Cells that were begun and have no result."""
    begun = {path.parent for path in (directory / "cells").glob("*/config.json")}
    return begun - {path.parent for path in results(directory)}


@pytest.mark.slow
def test_the_whole_study_rehearsed(tmp_path):
    """A killed study goes on and writes every report; all cells are then finished; another config is
    refused."""
    arguments = ["all", "--config", "configs/study_tiny.py", "--quick", "--seeds", "2", "--workdir", tmp_path]
    killed = start_study(*arguments, stderr=subprocess.DEVNULL)
    while len(results(tmp_path)) < 3 or not unfinished(tmp_path):
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    finished = {path: path.stat().st_mtime_ns for path in results(tmp_path)}
    first = study_command(*arguments, timeout=1500)
    assert first.returncode == 0, first.stderr
    assert finished == {path: path.stat().st_mtime_ns for path in finished}
    assert not unfinished(tmp_path)
    for name in COMPARISONS:
        text = (tmp_path / f"{name}.md").read_text()
        for line in text.splitlines():
            if line.startswith("![]("):
                assert (tmp_path / line[4:-1]).read_bytes().startswith(b"\x89PNG")
        assert "nan" not in text
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    keys = [(row["cell"], row["variant"], row["task"]) for row in rows]
    assert len(keys) == len(set(keys))
    assert {row["method"] for row in rows if row["variant"] in METHODS} == set(METHODS)
    for row in rows:
        path = tmp_path / "cells" / row["cell"] / "test_rows.json"
        assert path.is_file() == (row["accuracy"] is not None)
        if row["accuracy"] is None or "diverged" in row:
            continue
        scores = json.loads(path.read_text())
        mine = scores["routed"][row["task"]]
        assert row["accuracy"] == sum(mine["correct"]) / len(mine["correct"])
        assert row["loss"] == pytest.approx(sum(mine["nll"]) / sum(mine["tokens"]), abs=1e-4)
        several = row["trained_on"] == "mixed"
        forced = {name for name in FORCED if several or ("any" not in name and "all" not in name)}
        is_subject = row["variant"] == "milora" and row["steps"] and len(scores) > 1
        assert set(scores) == {"routed", *(forced if is_subject else ())}
    text = (tmp_path / "routing.md").read_text()
    assert "| random mask, kept | single tasks | 100% | 100% |" in text
    assert all(f"| {name} |" in text for name in FORCED)
    stamps = {path: path.stat().st_mtime_ns for path in results(tmp_path)}
    again = study_command(*arguments, timeout=300)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in results(tmp_path)} == stamps
    other = study_command(*arguments, "--methods", "lora,milora")
    assert other.returncode == 2
    assert "holds a study of another config" in other.stderr
