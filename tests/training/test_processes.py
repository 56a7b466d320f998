"""Two real processes on this machine: one run, its kill, and its resume, against a process alone."""

import json
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from milora_jax.cluster import Cluster
from milora_jax.config import MeshSection
from milora_jax.errors import EXIT_PREEMPTED, UserError
from milora_jax.parallel.mesh import make_mesh
from milora_jax.parallel.processes import HEARTBEAT_SECONDS, any_of_all, from_first, place, to_host, together
from milora_jax.storage.adapters import load_adapter
from milora_jax.storage.checkpoint import CheckpointDirectory
from tests.paths import ROOT, environment
from tests.training.runs import command

STEPS = 12
SETTINGS = {
    "train.batch_size": 8,
    "train.max_steps": STEPS,
    "train.save_every": 3,
    "train.eval_every": 4,
    "data.pack": "true",
    "data.max_length": 360,
    "adapter.dropout": 0.0,
    "mesh.data": 1,
    "mesh.fsdp": 4,
    "mesh.tensor": 2,
}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(folder, workdir, log, **settings):
    """Two processes of four devices each."""
    where, processes = f"127.0.0.1:{free_port()}", []
    for i in range(2):
        cluster = (f"--coordinator={where}", "--processes=2", f"--process={i}")
        with (log / f"process{i}.txt").open("w") as file:
            processes.append(
                subprocess.Popen(
                    [*command(folder, workdir, **{**SETTINGS, **settings}), *cluster],
                    cwd=ROOT,
                    env=environment(4),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    return processes


def finished(processes, log, seconds=150):
    codes = [process.wait(timeout=seconds) for process in processes]
    said = "\n".join((log / f"process{i}.txt").read_text() for i in range(len(processes)))
    assert codes == [0] * len(processes), said
    return said


def alone(folder, workdir, **settings):
    subprocess.run(
        command(folder, workdir, **{**SETTINGS, **settings}),
        cwd=ROOT,
        env=environment(8),
        check=True,
        timeout=400,
        capture_output=True,
    )


def metrics(workdir):
    kept = ("step", "loss", "grad_norm", "dev_perplexity", "load_balance", "expert_share")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in kept if name in line} for line in lines]


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


@pytest.mark.slow
def test_two_processes_are_one_and_a_killed_one_is_resumed(inputs, tmp_path):
    alone(inputs, tmp_path / "alone")
    log = tmp_path / "whole-log"
    log.mkdir()
    said = finished(start(inputs, tmp_path / "whole", log), log)
    # Gloo adds up in another order than one process does: the last bit may differ.
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "alone"), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            np.testing.assert_allclose(value, other[name], rtol=1e-6, err_msg=name)
    assert said.count("written to") == 1, "only the first process speaks"
    first, second = load_adapter(tmp_path / "alone"), load_adapter(tmp_path / "whole")
    close = [
        np.isclose(*map(np.asarray, pair), rtol=1e-5, atol=1e-6)
        for pair in zip(*map(jax.tree.leaves, (first.params, second.params)), strict=True)
    ]
    # Adam divides a gradient by its own size: where it is all but zero, its last bit decides the step. (On
    # some processors none of these values is so, on others one in several thousand.)
    others = sum(int((~leaf).sum()) for leaf in close)
    assert others <= sum(leaf.size for leaf in close) / 2000
    one, other = (newest_leaves(tmp_path / run, on_one)[1] for run in ("alone", "whole"))
    moments = [name for name in one if "/mu/" in name]
    assert moments
    for name in moments:
        np.testing.assert_allclose(one[name], other[name], atol=1e-5 * np.abs(one[name]).max(), err_msg=name)

    log = tmp_path / "killed-log"
    log.mkdir()
    processes = start(inputs, tmp_path / "killed", log)
    checkpoints = tmp_path / "killed" / "checkpoints"
    deadline = time.monotonic() + 300
    while not (checkpoints / "3").is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGKILL)
    assert processes[0].wait(timeout=300) != 0
    processes[1].wait()
    log = tmp_path / "resumed-log"
    log.mkdir()
    said = finished(start(inputs, tmp_path / "killed", log), log)
    assert "resuming at step" in said
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    resumed = load_adapter(tmp_path / "killed")
    jax.tree.map(np.testing.assert_array_equal, second.params, resumed.params)


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one_on_another_mesh(inputs, tmp_path):
    """SIGTERM to one stops both, with the same step saved; another mesh reads the same bits."""
    log = tmp_path / "log"
    log.mkdir()
    processes = start(inputs, tmp_path / "run", log, **{"train.max_steps": 400})
    while not (tmp_path / "run" / "checkpoints" / "3").is_dir():
        time.sleep(0.05)
        assert processes[0].poll() is None, (log / "process0.txt").read_text()
    processes[1].terminate()
    assert [process.wait(timeout=120) for process in processes] == [EXIT_PREEMPTED] * 2
    mesh = make_mesh(MeshSection(data=1, fsdp=8, tensor=1))

    def split(shape):
        first = next((axis for axis, size in enumerate(shape) if size % 8 == 0 and size), None)
        return NamedSharding(
            mesh, PartitionSpec(*(["fsdp" if a == first else None for a in range(len(shape))]))
        )

    step, whole = newest_leaves(tmp_path / "run", on_one)
    _, apart = newest_leaves(tmp_path / "run", split)
    jax.tree.map(np.testing.assert_array_equal, whole, apart)
    more = {"train.max_steps": 400, "mesh.fsdp": 8, "mesh.tensor": 1}
    process = subprocess.Popen(
        command(inputs, tmp_path / "run", **{**SETTINGS, **more}),
        cwd=ROOT,
        env=environment(8),
        stderr=subprocess.PIPE,
        text=True,
    )
    line = next(line for line in process.stderr if "resuming" in line)
    assert f"resuming at step {step}" in line
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == EXIT_PREEMPTED


def test_a_process_that_is_gone_is_missed_after_the_stated_time(monkeypatch):
    asked = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: asked.update(given))
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: None)
    with together(Cluster("127.0.0.1:1", 2, 0)):
        pass
    assert (asked["num_processes"], asked["process_id"]) == (2, 0)
    assert asked["heartbeat_timeout_seconds"] == HEARTBEAT_SECONDS == 30


def test_alone_nothing_is_asked_of_others():
    assert any_of_all(True)
    assert not any_of_all(False)
    assert from_first(-1) == -1
    values = {"a": np.arange(8.0, dtype=np.float32)}
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    placed = place(values, sharding)
    assert placed["a"].sharding == sharding
    np.testing.assert_array_equal(to_host(placed)["a"], values["a"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("host", 2, 0), "--coordinator is 'host': expected HOST:PORT"),
        (("host:1", 0, 0), "--processes is 0"),
        (("host:1", 2, 2), "--process is 2: expected 0 to 1"),
        (("", 2, -1), "--processes is 2"),
        (("", 0, 1), "--process is 1"),
    ],
)
def test_a_mistaken_cluster_is_one_line(values, message):
    with pytest.raises(UserError) as found:
        Cluster(*values)
    assert message in str(found.value)


def test_a_mistaken_cluster_ends_the_command_with_one_line(inputs, tmp_path):
    cluster = ("--coordinator=127.0.0.1:1", "--processes=2", "--process=5")
    found = subprocess.run(
        [*command(inputs, tmp_path / "w"), *cluster], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 2
    assert "--process is 5: expected 0 to 1" in found.stderr
    assert not (tmp_path / "w").exists()
