"""A mistake on any command line is one line and exit code 2."""

import subprocess
import sys

import pytest

from milora_jax.commands.command_line import choose_command
from milora_jax.errors import UserError
from tests.paths import ROOT

pytest.importorskip("ml_collections", reason="train.py reads its configs with it")

COMMANDS = {
    "train": ["train.py", "--config", "configs/tiny.py", "--nothing"],
    "generation": ["-m", "milora_jax.generation", "--nothing"],
    "evaluation": ["-m", "milora_jax.evaluation", "--limit", "x"],
    "study": ["-m", "milora_jax.evaluation", "study", "table9"],
    "mt-bench": ["-m", "milora_jax.evaluation", "mt-bench", "judge", "--nothing"],
    "storage": ["-m", "milora_jax.storage", "export", "--format", "other"],
    "storage without a command": ["-m", "milora_jax.storage"],
    "bench": ["-m", "milora_jax.bench", "decode"],
    "bench misspelt": ["-m", "milora_jax.bench", "deocde"],
    "parallel": ["-m", "milora_jax.parallel", "aot", "--nothing"],
    "package": ["-m", "milora_jax", "docter"],
    "doctor": ["-m", "milora_jax", "doctor", "--nothing"],
    "tiny": ["-m", "milora_jax.tiny", "--nothing"],
    "serve": ["serve.py", "--nothing"],
}


@pytest.mark.sweep("train", "storage without")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistake_is_one_line(name):
    done = subprocess.run(
        [sys.executable, *COMMANDS[name]], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help", "one"]])
def test_commands_are_listed_for_who_asks(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        choose_command("program", arguments, {"one": "does this", "another": "does that"})
    assert ended.value.code == 0
    usage, *lines = capsys.readouterr().out.splitlines()
    assert usage == "usage: program COMMAND ..."
    assert "  one      does this" in lines
    assert "  another  does that" in lines


def test_a_command_is_chosen_by_its_name():
    commands = {"one": "", "another": ""}
    assert choose_command("program", ["another", "one"], commands) == "another"
    with pytest.raises(UserError, match=r"'onne': expected one of one, another \(did you mean 'one'"):
        choose_command("program", ["onne"], commands)
