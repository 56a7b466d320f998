"""Two real processes on this machine: one run, its kill, and its resume, against a process alone."""

import json
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from milora_jax.cluster import Cluster
from milora_jax.config import MeshSection
from milora_jax.errors import EXIT_PREEMPTED, UserError
from milora_jax.parallel.mesh import make_mesh
from milora_jax.parallel.processes import (
    HEARTBEAT_SECONDS,
    from_first,
    place,
    to_host,
    together,
    watch_for_preemption_of_any,
)
from milora_jax.storage.adapters import load_adapter
from milora_jax.storage.files import read_json
from tests.paths import ROOT, environment
from tests.processes import FEWEST_SECONDS, ended, ends, free_port, run_together, said_by, start_together
from tests.training.runs import command, newest_leaves, on_one

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


def start(folder, workdir, log, **settings):
    """Two processes of four devices each."""
    return start_together([command(folder, workdir, **{**SETTINGS, **settings})] * 2, log, 4)


def finished(processes, log):
    codes, said = ends(processes, log, 2 * FEWEST_SECONDS)
    assert codes == [0] * len(processes), said
    return said


def alone(folder, workdir, **settings):
    subprocess.run(
        command(folder, workdir, **{**SETTINGS, **settings}),
        cwd=ROOT,
        env=environment(8),
        check=True,
        timeout=2 * FEWEST_SECONDS,
        capture_output=True,
    )


def metrics(workdir):
    kept = ("step", "loss", "grad_norm", "dev_perplexity", "load_balance", "expert_share")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in kept if name in line} for line in lines]


@pytest.mark.slow
def test_two_processes_are_one_and_a_killed_one_is_resumed(inputs, tmp_path):
    alone(inputs, tmp_path / "alone")
    log = tmp_path / "whole-log"
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
    processes = start(inputs, tmp_path / "killed", log)
    checkpoints = tmp_path / "killed" / "checkpoints"
    deadline = time.monotonic() + 300
    while not (checkpoints / "3").is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGKILL)
    assert processes[0].wait(timeout=300) != 0
    processes[1].wait()
    log = tmp_path / "resumed-log"
    said = finished(start(inputs, tmp_path / "killed", log), log)
    assert "resuming at step" in said
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    resumed = load_adapter(tmp_path / "killed")
    jax.tree.map(np.testing.assert_array_equal, second.params, resumed.params)


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one_on_another_mesh(inputs, tmp_path):
    """SIGTERM to one stops both, with the same step saved; another mesh reads the same bits."""
    log = tmp_path / "log"
    processes = start(inputs, tmp_path / "run", log, **{"train.max_steps": 400})
    while not (tmp_path / "run" / "checkpoints" / "3").is_dir():
        time.sleep(0.05)
        assert processes[0].poll() is None, said_by(log, 2)
    processes[1].terminate()
    assert [process.wait(timeout=FEWEST_SECONDS) for process in processes] == [EXIT_PREEMPTED] * 2
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
    process.communicate(timeout=FEWEST_SECONDS)
    assert process.returncode == EXIT_PREEMPTED


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "devices", "fsdp", "tensor"), [(4, 2, 4, 2), (2, 1, 2, 1)], ids=["four", "one device each"]
)
def test_processes_run_all_of_train_and_score_as_one(tmp_path, processes, devices, fsdp, tensor):
    """The embedded model from the first row to the last score: the table of one process."""
    settings = {
        "train.max_steps": 8,
        "train.eval_every": 4,
        "data.dev_limit": 32,
        "mesh.data": 1,
        "mesh.fsdp": fsdp,
        "mesh.tensor": tensor,
        "eval.limit": 10,
        "eval.batch_size": 16,
        "eval.max_new_tokens": 8,
    }
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    start = [sys.executable, "train.py", "--config", "configs/tiny.py", *flags]
    subprocess.run(
        [*start, f"--workdir={tmp_path / 'one'}"],
        cwd=ROOT,
        env=environment(processes * devices),
        check=True,
        timeout=600,
        capture_output=True,
    )
    commands = [[*start, f"--workdir={tmp_path / 'several'}"]] * processes
    printed = run_together(commands, tmp_path / "log", devices, 900)
    assert "accuracy" in printed
    one, several = (read_json(tmp_path / run / "summary.json") for run in ("one", "several"))
    assert one.keys() == several.keys()
    assert one["accuracy"] == several["accuracy"]
    assert one["loss_rows"] == several["loss_rows"]
    for which in ("base", "adapter"):
        found, expected = (list(each["loss"][which].values()) for each in (several, one))
        np.testing.assert_allclose(found, expected, rtol=1e-4 if which == "adapter" else 1e-6)
    texts = [(tmp_path / run / "predictions.jsonl").read_text() for run in ("one", "several")]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_a_host_with_another_setting_is_named_by_all(inputs, tmp_path):
    commands = [command(inputs, tmp_path / "run", **SETTINGS, **{"train.seed": i}) for i in range(2)]
    codes, texts = ended(start_together(commands, tmp_path / "log", 4)), said_by(tmp_path / "log", 2)
    assert codes == [2, 2], texts
    for said in texts:
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert "train.seed is 0 in process 0 and 1 in process 1" in line
    assert not (tmp_path / "run").exists()


def test_a_process_that_is_gone_is_missed_after_the_stated_time(monkeypatch):
    asked = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: asked.update(given))
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: None)
    with together(Cluster("127.0.0.1:1", 2, 0)):
        pass
    assert (asked["num_processes"], asked["process_id"]) == (2, 0)
    assert asked["heartbeat_timeout_seconds"] == HEARTBEAT_SECONDS == 30


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_host_that_never_comes_is_said_within_the_stated_time(process):
    script = f"""
from milora_jax.cluster import Cluster
from milora_jax.parallel import processes

processes.JOIN_SECONDS = 3
with processes.together(Cluster("127.0.0.1:{free_port()}", 2, {process})):
    pass
"""
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=100
    )
    assert found.returncode == EXIT_PREEMPTED
    assert found.stderr.startswith("error: the other processes did not all come within 3 s")
    assert len(found.stderr.splitlines()) == 1


def test_several_stop_where_the_preemption_service_says(monkeypatch):
    """Every call counts, in all processes alike; Ctrl-C is passed on as SIGTERM, the service's own signal."""
    asked, received = [], []
    monkeypatch.setattr("milora_jax.parallel.processes.several", lambda: True)
    monkeypatch.setattr(
        "jax.experimental.multihost_utils.reached_preemption_sync_point",
        lambda call: asked.append(call) or call == 2,
    )
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    service = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with watch_for_preemption_of_any() as preempted:
            assert [preempted() for _ in range(4)] == [False, True, True, True]
            assert asked == [1, 2]
            signal.raise_signal(signal.SIGINT)
            assert received == [signal.SIGTERM]
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, service)


def test_alone_nothing_is_asked_of_others():
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
