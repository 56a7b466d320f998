"""A mistake on any command line is one line and exit code 2."""

import subprocess
import sys

import pytest

from tests.test_architecture import ROOT

pytest.importorskip("ml_collections", reason="train.py reads its configs with it")

COMMANDS = {
    "train": ["train.py", "--config", "configs/tiny.py", "--nothing"],
    "generation": ["-m", "milora_jax.generation", "--nothing"],
    "evaluation": ["-m", "milora_jax.evaluation", "--limit", "x"],
    "mt-bench": ["-m", "milora_jax.evaluation", "mt-bench", "judge", "--nothing"],
    "storage": ["-m", "milora_jax.storage", "export", "--format", "other"],
    "storage without a command": ["-m", "milora_jax.storage"],
    "bench": ["-m", "milora_jax.bench", "decode"],
    "parallel": ["-m", "milora_jax.parallel", "aot", "--nothing"],
    "package": ["-m", "milora_jax", "docter"],
    "doctor": ["-m", "milora_jax", "doctor", "--nothing"],
    "tiny": ["-m", "milora_jax.tiny", "--nothing"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistake_is_one_line(name):
    done = subprocess.run(
        [sys.executable, *COMMANDS[name]], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1, done.stderr
