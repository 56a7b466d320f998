"""Runs of six steps in this process, on a base of two layers, for tests of the loop."""

import dataclasses
import json

import jax
import numpy as np
from jax.sharding import Mesh

from milora_jax.config import Config, DataSection, ModelSection, TrainSection
from milora_jax.parallel.rules import base_shardings
from milora_jax.training.loop import Trainer
from milora_jax.training.prepare import prepare_run
from milora_jax.training.progress import planned_steps
from milora_jax.training.step import make_steps
from tests.models import WITH_TOKENIZER, write_hf_directory

SHALLOW = dataclasses.replace(WITH_TOKENIZER, num_layers=2)
STEPS, STOP = 6, 3

SHORT = {
    "max_steps": STEPS,
    "epochs": 30,
    "batch_size": 8,
    "learning_rate": 1e-2,
    "eval_every": 2,
    "save_every": 100,
    "coefficient_every": 2,
}
"""Settings of training."""


def silent(line):
    pass


def on_one_device(run):
    """The same run on one of the tests' eight devices, for which a step compiles faster."""
    one = Mesh(np.reshape(jax.devices()[:1], [1] * len(run.mesh.axis_names)), run.mesh.axis_names)
    return dataclasses.replace(run, mesh=one, base=jax.device_put(run.base, base_shardings(one, run.base)))


def prepare_short_run(folder):
    """A run on a small base, and the programs that all methods' runs share."""
    write_hf_directory(folder / "model", SHALLOW)
    rows = [{"instruction": f"say {i}", "input": "", "output": f"{i} {i}"} for i in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = TrainSection(**SHORT)
    config = Config(
        model=ModelSection(path=str(folder / "model")),
        data=DataSection(train=str(folder / "rows.jsonl"), dev_share=0.2, max_length=360, pack=True),
        train=settings,
    )
    run = prepare_run(config, folder / "none", silent)
    assert run.prompts > 1, "no row is packed"
    run = on_one_device(run)
    return run, make_steps(run.model, settings, planned_steps(settings, len(run.train)))


def fit(run, steps, workdir, stop_after=None):
    reached = []
    workdir.mkdir(exist_ok=True)
    trainer = Trainer(run, workdir, silent, steps)
    return trainer.fit(lambda done, status: reached.append(done), lambda: len(reached) + 1 == stop_after)
