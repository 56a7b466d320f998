"""What a finished run tells its owner to type works."""

import shlex
import sys
from pathlib import Path

import pytest

from milora_jax.config import Config
from milora_jax.evaluation import score_command
from milora_jax.evaluation.closing import closing_lines
from milora_jax.generation import __main__ as generation
from milora_jax.storage import __main__ as storage

PARSERS = {
    "milora_jax.generation": generation.parse_arguments,
    "milora_jax.evaluation": lambda: score_command.parse_arguments(sys.argv[1:]),
    "milora_jax.storage": storage.parse_arguments,
}


def test_every_command_is_one_that_there_is(monkeypatch):
    written, *commands = closing_lines(Path("runs/my run"), Config())
    assert written.startswith("written to runs/my run: best/ (the adapter), summary.json")
    assert commands[0].startswith("next: python -m milora_jax.generation")
    assert len(commands) == len(PARSERS)
    for line in commands:
        words = shlex.split(line.removeprefix("next:"))
        assert words[:2] == ["python", "-m"]
        monkeypatch.setattr(sys, "argv", words[2:])
        assert PARSERS[words[2]]().workdir == Path("runs/my run")


@pytest.mark.parametrize(("trackers", "shown"), [("wandb", False), ("wandb,tensorboard", True)])
def test_tensorboard_is_named_where_there_is_something_to_see(trackers, shown):
    config = Config.from_dict({"train": {"trackers": trackers}, "data": {"test": "a.jsonl"}})
    lines = closing_lines(Path("runs/a"), config)
    assert ("      tensorboard --logdir runs/a" in lines) == shown
    assert "predictions.jsonl" in lines[0]
