"""What a finished run tells its owner to type works."""

import shlex
import sys
from pathlib import Path

import pytest

from milora_jax.adapters.registry import METHODS
from milora_jax.commands import evaluation, generation, storage
from milora_jax.config import Config
from milora_jax.evaluation.next_steps import next_steps
from tests.models import TINY

PARSERS = {
    "milora_jax.generation": generation.parse_arguments,
    "milora_jax.evaluation": evaluation.parse_arguments,
    "milora_jax.storage": storage.parse_arguments,
}


@pytest.mark.parametrize("test", ["", "rows.jsonl"])
@pytest.mark.parametrize("method", METHODS)
def test_every_command_is_one_that_there_is(monkeypatch, method, test):
    config = Config.from_dict(
        {"model": {"path": "a base"}, "data": {"test": test}, "adapter": {"method": method}}
    )
    written, *commands = next_steps(Path("runs/my run"), config, TINY, ["summary.json"])
    assert written.startswith("written to runs/my run: best/ (the adapter), summary.json")
    assert commands[0].startswith("next: python -m milora_jax.generation")
    told = [shlex.split(line.removeprefix("next:")) for line in commands]
    assert [words[:2] for words in told[:-1]] == [["python", "-m"]] * len(PARSERS)
    for words in told[:-1]:
        monkeypatch.setattr(sys, "argv", words[2:])
        assert PARSERS[words[2]]().workdir == Path("runs/my run")
    assert told[-1] == ["python", "serve.py", "--base", "a base", "--adapter", "mine=runs/my run"]
    scored = next(words for words in told if words[2] == "milora_jax.evaluation")
    assert ("--data" in scored) == (not test), "a run knows its own test files"


@pytest.mark.parametrize(("trackers", "shown"), [("wandb", False), ("wandb,tensorboard", True)])
def test_tensorboard_is_named_where_there_is_something_to_see(trackers, shown):
    config = Config.from_dict({"train": {"trackers": trackers}, "data": {"test": "a.jsonl"}})
    lines = next_steps(Path("runs/a"), config, TINY, ["predictions.jsonl"])
    assert ("      tensorboard --logdir runs/a" in lines) == shown
    assert lines[0].endswith(": best/ (the adapter), predictions.jsonl")


def test_a_base_in_this_folder_is_named_from_here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for path, shown in ((f"{tmp_path}/a/model", "a/model"), ("/elsewhere/model", "/elsewhere/model")):
        *_, serving = next_steps(Path("runs/a"), Config.from_dict({"model": {"path": path}}), TINY, [])
        assert shlex.split(serving)[3] == shown
