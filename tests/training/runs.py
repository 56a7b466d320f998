"""``train.py`` as a person would start it, on inputs small enough to kill it often."""

import json
import sys
from pathlib import Path

from tests.models import write_hf_directory

ROOT = Path(__file__).resolve().parents[2]


def write_inputs(folder):
    """A small model directory and a training file."""
    write_hf_directory(folder / "model")
    write_rows(folder)


def write_rows(folder):
    """The training file alone."""
    rows = [
        {"instruction": f"say {i} twice", "input": "", "output": f"{i} {i}", "answer": f"{i}"}
        for i in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(inputs, workdir, **settings):
    values = {
        "model.path": inputs / "model",
        "data.train": inputs / "rows.jsonl",
        "data.dev": "",
        "data.test": "",
        "data.max_length": 512,
        "adapter.rank": 2,
        "adapter.dropout": 0.1,
        "train.batch_size": 4,
        "train.max_steps": 30,
        "train.save_every": 1,
        "train.eval_every": 7,
        "train.log_every": 1,
        "train.coefficient_every": 3,
        "train.coefficient_learning_rate": 1e-3,
        "train.learning_rate": 1e-2,
        "mesh.data": 1,
        **settings,
    }
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    return [sys.executable, "train.py", "--config", "configs/tiny.py", f"--workdir={workdir}", *flags]
