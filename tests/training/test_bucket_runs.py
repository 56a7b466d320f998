"""Runs whose workdir is in a bucket end with the bits of runs on a disk, whatever the bucket answers."""

import contextlib
import itertools
import json
import re
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from milora_jax.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED, Preempted
from milora_jax.storage.adapters import best_metadata, load_adapter
from milora_jax.storage.checkpoint import CheckpointDirectory
from milora_jax.storage.mirror import opened_workdir
from milora_jax.training.loop import Trainer
from milora_jax.training.workdir import claimed
from tests.fake_gcs import BUCKET, CUT, LOST, RESET, in_reach
from tests.paths import ROOT, environment
from tests.processes import ends, start_together
from tests.training.runs import assert_same_end, command, life, newest_leaves, on_one
from tests.training.short_runs import STEPS, STOP, fit, silent

pytest.importorskip("tensorstore")

RUN = "runs/math"
URL = f"gs://{BUCKET}/{RUN}"
FAULTS = (429, 503, RESET, LOST, CUT)


@pytest.fixture
def storage(monkeypatch):
    with in_reach(monkeypatch, retries=8) as storage:
        yield storage


def fit_in_bucket(run, steps, stop_after=None):
    reached = []
    with opened_workdir(URL, silent) as (workdir, publisher), claimed(workdir, run.config):
        trainer = Trainer(run, workdir, silent, steps, publisher)
        return trainer.fit(
            lambda done, status: reached.append(done), lambda: len(reached) + 1 == stop_after
        ), reached


def metrics_in(text):
    lines = [json.loads(line) for line in text.splitlines()]
    return [{name: line[name] for name in line if name != "tokens_per_second"} for line in lines]


def shaken(seed):
    """Faults in a tenth of all answers."""
    generator = np.random.default_rng(seed)
    return lambda method: int(generator.choice(FAULTS)) if generator.random() < 0.1 else 0


@pytest.mark.thorough
@pytest.mark.parametrize("seed", [None, 0])
def test_a_run_in_a_bucket_is_the_run_on_a_disk(storage, prepared, tmp_path, seed):
    run, steps = prepared
    storage.fault = (lambda method: 0) if seed is None else shaken(seed)
    there = fit(run, steps, tmp_path / "disk")
    with pytest.raises(Preempted, match=f"saved step {STOP}"):
        fit_in_bucket(run, steps, STOP)
    assert f"{RUN}/checkpoints/{STOP}/manifest.json" in storage.objects
    here, reached = fit_in_bucket(run, steps)
    assert reached == list(range(STOP + 1, STEPS + 1))
    assert f"{RUN}/.lock" not in storage.objects
    for one, other in zip(*(jax.tree.leaves(each.state) for each in (here, there)), strict=True):
        if jax.numpy.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        np.testing.assert_array_equal(one, other)
    logged = (tmp_path / "disk" / "metrics.jsonl").read_text()
    assert metrics_in(storage.objects[f"{RUN}/metrics.jsonl"].decode()) == metrics_in(logged)
    best = [load_adapter(place).params for place in (URL, tmp_path / "disk")]
    jax.tree.map(np.testing.assert_array_equal, *best)
    assert best_metadata(URL) == best_metadata(tmp_path / "disk")


SHORT = """
import sys, time
from milora_jax.base import gcs
from milora_jax.storage import bucket_lock
gcs.RETRIES = {"max_retries": 8, "initial_delay": "10ms", "max_delay": "100ms"}
bucket_lock.LEASE_SECONDS, bucket_lock.HEARTBEAT_SECONDS, bucket_lock.LOOK_SECONDS = 3.0, 0.5, 0.2
shift, true = float(sys.argv.pop(1)), time.time
time.time = lambda: true() + shift
sys.argv = sys.argv[1:]
import train
train.run_command(train.main)
"""
"""train.py with a short lease, quick retries, and a clock wrong by the seconds of the first argument."""


def short_command(inputs, shift=0.0, **settings):
    python, *given = command(inputs, URL, **settings)
    return [python, "-c", SHORT, str(shift), *given]


def start(inputs, shift=0.0, devices=1, **settings):
    return subprocess.Popen(
        short_command(inputs, shift, **settings),
        cwd=ROOT,
        env=environment(devices),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def killed_at_a_write(storage, process, generator, most):
    """Kill a process before or after one of the next ``most`` writes to the bucket, if there are so many."""
    target, before, seen = int(generator.integers(1, most)), bool(generator.integers(2)), itertools.count(1)

    def kill(method, name, done):
        if done != before and next(seen) == target:
            process.kill()

    storage.watch = kill
    yield
    storage.watch = lambda method, name, done: None


def whole_steps(storage, folder="checkpoints"):
    pattern = re.compile(rf"{RUN}/{folder}/(\d+)/manifest\.json")
    return sorted(int(match[1]) for match in map(pattern.fullmatch, list(storage.objects)) if match)


@pytest.mark.slow
def test_kill_nine_at_thirty_random_moments(storage, inputs, tmp_path):
    """Faults in a tenth of the answers, and clocks that are wrong by years, beside."""
    assert life(inputs, tmp_path / "undisturbed").returncode == 0
    generator, killed, ended = np.random.default_rng(0), 0, 0
    storage.fault = shaken(1)
    while killed < 30 or storage.objects:
        announced = whole_steps(storage)
        process = start(inputs, shift=float(generator.normal() * 1e8))
        with killed_at_a_write(storage, process, generator, 90) if killed < 30 else contextlib.nullcontext():
            _, said = process.communicate(timeout=300)
        killed += process.returncode == -signal.SIGKILL
        assert process.returncode in (0, -signal.SIGKILL), said
        resumed = re.search(r"(?:resuming|ended) at step (\d+)", said)
        if resumed:
            assert int(resumed[1]) == announced[-1], "a step that was announced is lost"
        assert not announced or whole_steps(storage)[-1] >= announced[-1]
        assert "damaged" not in said
        if process.returncode == 0:
            ended += 1
            workdir = storage.download(RUN, tmp_path / f"ended{ended}")
            assert_same_end(workdir, tmp_path / "undisturbed")
            logged = metrics_in((workdir / "metrics.jsonl").read_text())
            assert logged == metrics_in((tmp_path / "undisturbed" / "metrics.jsonl").read_text())
            storage.objects.clear()
    assert killed == 30
    assert ended


@pytest.mark.slow
def test_a_second_run_is_refused_and_sigterm_saves(storage, inputs, tmp_path):
    first = start(inputs, **{"train.max_steps": 400})
    while not whole_steps(storage):
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.05)
    second = start(inputs, **{"train.max_steps": 400})
    _, said = second.communicate(timeout=120)
    assert second.returncode == EXIT_BAD_INPUT
    assert said.splitlines()[-1].startswith(f"error: workdir {URL} is in use by another run (pid {first.pid}")
    first.terminate()
    _, said = first.communicate(timeout=120)
    assert first.returncode == EXIT_PREEMPTED, said
    step = int(re.search(r"saved step (\d+)", said)[1])
    assert whole_steps(storage)[-1] == step
    assert f"{RUN}/.lock" not in storage.objects
    third = start(inputs, **{"train.max_steps": 401})
    _, said = third.communicate(timeout=120)
    assert third.returncode == EXIT_BAD_INPUT
    assert said.splitlines()[-1].startswith(
        f"error: workdir '{URL}' holds another run: train.max_steps is 400"
    )


TWO = {
    "train.batch_size": 8,
    "train.max_steps": 12,
    "train.save_every": 3,
    "train.eval_every": 4,
    "adapter.dropout": 0.0,
    "mesh.data": 1,
    "mesh.fsdp": 4,
    "mesh.tensor": 2,
}


def start_two(inputs, log, **settings):
    """Two processes of four devices each, with the short lease."""
    return start_together([short_command(inputs, **{**TWO, **settings})] * 2, log, 4)


@pytest.mark.slow
def test_two_processes_in_a_bucket_are_those_on_a_shared_disk(storage, inputs, tmp_path):
    log = tmp_path / "disk-log"
    codes, said = ends(start_together([command(inputs, tmp_path / "disk", **TWO)] * 2, log, 4), log)
    assert codes == [0, 0], said
    processes = start_two(inputs, tmp_path / "killed")
    while not whole_steps(storage):
        time.sleep(0.05)
        assert processes[0].poll() is None, ends(processes, tmp_path / "killed")
    processes[1].send_signal(signal.SIGKILL)
    assert processes[0].wait(timeout=300) != 0
    processes[1].wait()
    announced = whole_steps(storage)[-1]
    codes, said = ends(start_two(inputs, tmp_path / "resumed"), tmp_path / "resumed")
    assert codes == [0, 0], said
    assert f"resuming at step {announced}" in said
    assert said.count("written to") == 1, "only the first process speaks"
    copy = storage.download(RUN, tmp_path / "copy")
    one, other = newest_leaves(copy, on_one), newest_leaves(tmp_path / "disk", on_one)
    assert one[0] == other[0] == 12
    jax.tree.map(np.testing.assert_array_equal, one[1], other[1])
    jax.tree.map(
        np.testing.assert_array_equal, load_adapter(URL).params, load_adapter(tmp_path / "disk").params
    )


@pytest.mark.slow
def test_kill_nine_of_one_of_two_at_thirty_random_moments(storage, inputs, tmp_path):
    """The other one ends by itself, and no step is lost that was announced."""
    codes, said = ends(start_two(inputs, tmp_path / "undisturbed"), tmp_path / "undisturbed")
    assert codes == [0, 0], said
    undisturbed, writes = storage.download(RUN, tmp_path / "whole"), len(storage.written)
    storage.objects.clear()
    generator, killed, runs = np.random.default_rng(2), 0, 0
    while killed < 30 or storage.objects:
        announced, runs, log = whole_steps(storage), runs + 1, tmp_path / f"log{runs}"
        processes = start_two(inputs, log)
        victim = processes[int(generator.integers(2))]
        with (
            killed_at_a_write(storage, victim, generator, writes) if killed < 30 else contextlib.nullcontext()
        ):
            codes, said = ends(processes, log)
        hit = -signal.SIGKILL in codes
        killed += hit
        assert hit or codes == [0, 0], said
        resumed = re.search(r"(?:resuming|ended) at step (\d+)", said)
        if resumed:
            assert int(resumed[1]) == announced[-1], "a step that was announced is lost"
        assert not announced or whole_steps(storage)[-1] >= announced[-1]
        assert "damaged" not in said
        if codes == [0, 0]:
            assert_same_end(storage.download(RUN, tmp_path / f"ended{runs}"), undisturbed)
            storage.objects.clear()
    assert killed == 30


@pytest.mark.slow
def test_sigterm_to_one_of_two_saves_the_same_step_and_one_process_goes_on(storage, inputs, tmp_path):
    log = tmp_path / "log"
    processes = start_two(inputs, log, **{"train.max_steps": 400})
    while not whole_steps(storage):
        time.sleep(0.05)
        assert processes[0].poll() is None, ends(processes, log)
    processes[1].terminate()
    codes, said = ends(processes, log)
    assert codes == [EXIT_PREEMPTED] * 2, said
    step = int(re.search(r"saved step (\d+)", said)[1])
    assert whole_steps(storage)[-1] == step
    alone = start(inputs, devices=8, **{**TWO, "train.max_steps": 400, "mesh.fsdp": 8, "mesh.tensor": 1})
    line = next(line for line in alone.stderr if "resuming" in line)
    assert f"resuming at step {step}" in line
    alone.terminate()
    alone.communicate(timeout=120)
    assert alone.returncode == EXIT_PREEMPTED
    with opened_workdir(URL, silent) as (workdir, _):
        assert CheckpointDirectory(workdir / "checkpoints", 2, pytest.fail).newest() >= step
