"""A small run that is healthy, to be made ill."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from milora_jax.adapters.registry import build_method, full_settings
from milora_jax.config import Config, DataSection, EvalSection, ModelSection
from milora_jax.doctor.checks import CHECKS
from milora_jax.doctor.findings import FAIL, WARN
from milora_jax.doctor.subject import Subject
from milora_jax.storage.checkpoint import CheckpointDirectory
from milora_jax.storage.files import json_bytes
from tests.models import SMALL, write_hf_directory
from tests.storage.adapters import run_of


def write_rows(path, first, count):
    """A data file of sums that no other has."""
    rows = [{"instruction": f"{i} + 1", "output": f"{i + 1}"} for i in range(first, first + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_inputs(folder):
    """A model and a file of each split."""
    write_hf_directory(folder / "model")
    for i, split in enumerate(("train", "dev", "test")):
        write_rows(folder / f"{split}.jsonl", 100 * i, 16)


def config_of(folder, **data):
    """Settings of a run on what :func:`write_inputs` wrote."""
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "dev", "test")}
    values = {**files, "max_length": 256, **data}
    model = ModelSection(path=str(folder / "model"))
    evaluation = EvalSection(max_new_tokens=8)
    made = Config(model=model, data=DataSection(**values), eval=evaluation)
    adapter = dataclasses.replace(made.adapter, **SMALL["milora"])
    return dataclasses.replace(made, adapter=adapter)


def write_workdir(folder, config):
    """A workdir of a run with a checkpoint and a best adapter."""
    run_of(folder, Path(config.model.path), "milora", **SMALL["milora"])
    directory = CheckpointDirectory(folder / "checkpoints", 2, print)
    directory.save(7, {"step": np.zeros((), np.int32)}, {"base_fingerprint": _kept_fingerprint(folder)})
    directory.wait()
    written = dataclasses.replace(config, adapter=full_settings(build_method(config.adapter)))
    (folder / "config.json").write_bytes(json_bytes(written.to_dict()))


def _kept_fingerprint(folder):
    return json.loads((folder / "best/7/metadata.json").read_text())["metadata"]["base_fingerprint"]


def flags_of(config):
    """A config as flags over ``configs/tiny.py``."""
    data, model = config.data, config.model
    named = {"model.path": model.path, "adapter.rank": config.adapter.rank, "eval.max_new_tokens": 8}
    named |= {f"data.{name}": getattr(data, name) for name in ("train", "dev", "test", "max_length")}
    return [f"--config.{name}={value}" for name, value in named.items()]


def looked_at(name, config, workdir=None, kept=None, after=()):
    """What one check finds, those before it made first."""
    subject = Subject(config, kept, workdir)
    looks = {check.name: check.look for check in CHECKS}
    for earlier in after:
        list(looks[earlier](subject))
    return list(looks[name](subject))


def bad(findings):
    """The lines of those that are not ok."""
    return [finding.line() for finding in findings if finding.level in (WARN, FAIL)]


def run_command_line(monkeypatch, *arguments):
    """The doctor as if it had been started with the arguments."""
    from milora_jax.commands import index as command

    monkeypatch.setattr(sys, "argv", ["milora_jax", "doctor", *map(str, arguments)])
    command.main()
