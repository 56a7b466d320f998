"""``train.py`` as a person would start it, on inputs small enough to kill it often."""

import json
import subprocess
import sys
import warnings

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from milora_jax.storage.checkpoint import CheckpointDirectory
from tests.models import write_hf_directory
from tests.paths import ROOT, environment


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


def life(inputs, workdir, failpoint="", **settings):
    return subprocess.run(
        command(inputs, workdir, **settings),
        cwd=ROOT,
        env=environment(**({"MILORA_FAILPOINT": failpoint} if failpoint else {})),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def steps_of(workdir):
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def final_leaves(workdir):
    """Every array of the newest checkpoint, read straight from the disk."""
    from orbax.checkpoint import v1 as ocp
    from safetensors.numpy import load_file

    step = workdir / "checkpoints" / str(steps_of(workdir)[-1])
    if (step / "arrays.safetensors").is_file():  # of a workdir in a bucket
        return {f"['{name}']": leaf for name, leaf in load_file(step / "arrays.safetensors").items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Orbax says that it takes the shardings from the file
        tree = ocp.load(step / "tree")
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_same_end(workdir, reference):
    found, expected = final_leaves(workdir), final_leaves(reference)
    assert found.keys() == expected.keys()
    assert len(found) > 20
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)
    progress = [json.loads((w / "summary.json").read_text()) for w in (workdir, reference)]
    assert progress[0]["best_step"] == progress[1]["best_step"]
    assert progress[0]["dev_perplexity"] == progress[1]["dev_perplexity"]
    bests = [
        sorted(int(p.name) for p in (w / "best").iterdir() if p.name.isdigit()) for w in (workdir, reference)
    ]
    assert bests[0][-1] == bests[1][-1] == progress[0]["best_step"]


def newest_leaves(workdir, sharding):
    """The newest step of a run and its arrays, every one laid out as asked."""
    directory = CheckpointDirectory(workdir / "checkpoints", 2, print)
    step = directory.newest()
    content = json.loads((directory.root / str(step) / "metadata.json").read_text())
    key = jax.random.key(0).dtype
    asked = {
        name: jax.ShapeDtypeStruct(
            leaf["shape"], key if leaf["impl"] else np.dtype(leaf["dtype"]), sharding=sharding(leaf["shape"])
        )
        for name, leaf in content["leaves"].items()
    }
    leaves, _ = directory.restore(step, asked)
    return step, {
        name: np.asarray(jax.random.key_data(leaf) if content["leaves"][name]["impl"] else leaf)
        for name, leaf in leaves.items()
    }


def on_one(shape):
    return SingleDeviceSharding(jax.devices()[0])
