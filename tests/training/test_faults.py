"""Kill, preempt, poison and double-start real runs of ``train.py``; resume must be exact."""

import json
import shutil
import signal
import subprocess
import time

import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.errors import EXIT_BAD_INPUT, EXIT_NON_FINITE, EXIT_PREEMPTED
from milora_jax.storage.failpoints import FAILPOINTS
from tests.paths import ROOT, environment
from tests.training.runs import assert_same_end, command, final_leaves, life, steps_of


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    result = life(inputs, workdir)
    assert result.returncode == 0, result.stderr
    assert steps_of(workdir)[-1] == 30
    return workdir


EVERYWHERE = tuple(f"{name}:{count}" for count in (2, 3) for name in FAILPOINTS)
"""Every point of a save, in the second and in the third one of a life."""


@pytest.mark.thorough
def test_kill_nine_in_a_save_and_resume_bit_for_bit(inputs, undisturbed, tmp_path):
    workdir = tmp_path / "killed"
    assert len(EVERYWHERE) >= 12
    for failpoint in EVERYWHERE:
        before = steps_of(workdir)[-1:] or [0]
        result = life(inputs, workdir, failpoint)
        assert result.returncode == -signal.SIGKILL, (failpoint, result.stderr)
        # Two checkpoints are kept, so the newest verified step is at most one save behind.
        assert steps_of(workdir)[-1] > before[0], f"the life killed at {failpoint} made no progress"
    result = life(inputs, workdir)
    assert result.returncode == 0, result.stderr
    assert_same_end(workdir, undisturbed)
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    trained = [line["step"] for line in logged if "loss" in line]
    assert trained == list(range(1, 31)), "every step is logged once, in order"


@pytest.mark.slow
def test_kill_nine_of_a_preference_run_and_resume_bit_for_bit(inputs, tmp_path):
    """At every point of a save, of a run that starts from an adapter, which is its reference."""
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"say {i}", "chosen": f"{i}", "rejected": f"{i} {i} {i}"} for i in range(40)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = life(inputs, tmp_path / "first", **{"train.max_steps": 4})
    assert first.returncode in (0, 4), first.stderr
    settings = {"data.train": pairs, "train.objective": "dpo", "train.init_from": tmp_path / "first"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert life(inputs, whole, **settings).returncode == 0
    for name in FAILPOINTS:
        result = life(inputs, killed, f"{name}:2", **settings)
        assert result.returncode == -signal.SIGKILL, (name, result.stderr)
    result = life(inputs, killed, **settings)
    assert result.returncode == 0, result.stderr
    assert_same_end(killed, whole)
    accuracies, trained = [], []
    for line in map(json.loads, (killed / "metrics.jsonl").read_text().splitlines()):
        accuracies += [line["dev_rewards/accuracies"]] if "dev_rewards/accuracies" in line else []
        trained += [line["step"]] if "loss" in line else []
    assert trained == list(range(1, 31))
    assert accuracies[-1] >= accuracies[0]


def wait_for_step(workdir, step):
    deadline = time.monotonic() + 120
    path = workdir / "metrics.jsonl"
    while time.monotonic() < deadline:
        if path.is_file() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} never came")


@pytest.mark.thorough
def test_sigterm_saves_and_a_second_run_is_refused(inputs, undisturbed, tmp_path):
    workdir = tmp_path / "preempted"
    slow = {"train.save_every": 1000}
    first = subprocess.Popen(
        command(inputs, workdir, **slow), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
    )
    wait_for_step(workdir, 2)
    first.send_signal(signal.SIGSTOP)
    second = life(inputs, workdir, **slow)
    first.send_signal(signal.SIGTERM)
    first.send_signal(signal.SIGCONT)
    _, errors = first.communicate(timeout=120)
    assert second.returncode == EXIT_BAD_INPUT
    assert str(first.pid) in second.stderr.splitlines()[-1]
    assert first.returncode == EXIT_PREEMPTED, errors
    assert 0 < steps_of(workdir)[-1] < 30
    assert life(inputs, workdir, **slow).returncode == 0
    assert_same_end(workdir, undisturbed)


@pytest.mark.thorough
def test_non_finite_updates_stop_the_run_and_spoil_nothing(inputs, tmp_path):
    workdir = tmp_path / "poisoned"
    result = life(inputs, workdir, **{"train.learning_rate": 1e38, "train.clip_norm": 0.0})
    assert result.returncode == EXIT_NON_FINITE, result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: 5 updates in a row")
    if steps_of(workdir):
        assert all(np.isfinite(leaf).all() for leaf in final_leaves(workdir).values())
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert max(line.get("bad_steps", 0) for line in lines) >= 4


@pytest.mark.slow
def test_updates_of_theta_that_are_never_finite_stop_the_run(inputs, tmp_path):
    settings = {"train.coefficient_learning_rate": 1e38, "train.coefficient_every": 1, "train.clip_norm": 0.0}
    result = life(inputs, tmp_path / "theta", **settings)
    assert result.returncode == EXIT_NON_FINITE, result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: 5 updates in a row")


@pytest.mark.thorough
def test_sigterm_while_scoring_ends_with_the_code_that_asks_for_more(inputs, tmp_path):
    workdir = tmp_path / "scoring"
    settings = {"data.test": inputs / "rows.jsonl", "eval.batch_size": 2, "eval.max_new_tokens": 40}
    with subprocess.Popen(
        command(inputs, workdir, **settings),
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        lines = iter(run.stderr.readline, "")
        next(line for line in lines if line.startswith("workdir "))
        run.send_signal(signal.SIGTERM)
        *_, last = lines
    assert run.returncode == EXIT_PREEMPTED, last
    assert last.startswith("error: stopped while computing the loss of the base")
    assert not (workdir / "summary.json").exists()


def damage(step):
    with (step / "metadata.json").open("ab") as file:
        file.write(b" ")


@pytest.mark.thorough
def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again(inputs, undisturbed, tmp_path):
    workdir = tmp_path / "damaged"
    shutil.copytree(undisturbed, workdir)
    for step in steps_of(workdir):
        damage(workdir / "checkpoints" / str(step))
    result = life(inputs, workdir)
    assert result.returncode == EXIT_BAD_INPUT
    assert "every checkpoint of" in result.stderr.splitlines()[-1]
    assert (workdir / "metrics.jsonl").read_text() == (undisturbed / "metrics.jsonl").read_text()


@pytest.mark.thorough
def test_a_run_whose_best_adapter_is_damaged_says_so(inputs, undisturbed, tmp_path):
    workdir = tmp_path / "damaged"
    shutil.copytree(undisturbed, workdir)
    best = json.loads((workdir / "summary.json").read_text())["best_step"]
    damage(workdir / "best" / str(best))
    result = life(inputs, workdir)
    assert result.returncode == EXIT_BAD_INPUT
    assert f"best/{best} is damaged: metadata.json" in result.stderr.splitlines()[-1]


@pytest.mark.thorough
def test_another_base_under_the_same_name_is_refused(inputs, undisturbed):
    path = inputs / "model" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-8] + b"\1\1\1\1\1\1\1\1")
    try:
        result = life(inputs, undisturbed)
    finally:
        path.write_bytes(content)
    assert result.returncode == EXIT_BAD_INPUT
    assert "the files of the base changed since step 30" in result.stderr.splitlines()[-1]


@pytest.mark.thorough
def test_another_config_is_refused_and_the_same_one_is_not_trained_again(inputs, undisturbed):
    before = (undisturbed / "metrics.jsonl").read_text()
    other = life(inputs, undisturbed, **{"adapter.top_k": 2})
    assert other.returncode == EXIT_BAD_INPUT
    assert "adapter.top_k is 3 there and 2 now" in other.stderr.splitlines()[-1]
    again = life(inputs, undisturbed)
    assert again.returncode == 0
    assert "trained already: ended at step 30" in again.stderr
    assert (undisturbed / "metrics.jsonl").read_text() == before


@pytest.mark.thorough
def test_changed_rows_are_refused(inputs, undisturbed):
    path = inputs / "rows.jsonl"
    text = path.read_text()
    path.write_text(text.replace("say 3 twice", "say 3 thrice"))
    try:
        result = life(inputs, undisturbed)
    finally:
        path.write_text(text)
    assert result.returncode == EXIT_BAD_INPUT
    assert "rows changed since step 30" in result.stderr.splitlines()[-1]


@pytest.mark.thorough
def test_the_saved_state_holds_no_base(undisturbed):
    names = final_leaves(undisturbed)
    assert not any("embedding" in name or "kernel" in name for name in names)
    assert jnp.isfinite(json.loads((undisturbed / "summary.json").read_text())["dev_perplexity"])
