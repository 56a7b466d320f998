"""Whole runs of the command lines on the published model, as a person would start them. Minutes each."""

import json
import signal
import subprocess
import sys

import pytest

from milora_jax.data.prompts import prompt_text
from milora_jax.data.records import read_records
from milora_jax.data.sources import Source
from milora_jax.storage.export import export_milora
from milora_jax.storage.torch_reference import attach
from tests.paths import ROOT, environment
from tests.real.reference import text_of, their_answer
from tests.training.runs import assert_same_end, life, steps_of, write_rows

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

LIMIT = 12
NEW = 16
LEARNT = 24


def test_a_run_that_was_killed_ends_as_the_undisturbed_one(folder, tmp_path, record):
    """By ``kill -9`` while it saves; both ends are the same bit for bit."""
    write_rows(tmp_path)
    settings = {
        "model.path": folder,
        "data.max_length": 96,
        "train.max_steps": 4,
        "train.eval_every": 2,
        "train.coefficient_every": 2,
    }
    whole = life(tmp_path, tmp_path / "whole", **settings)
    assert whole.returncode == 0, whole.stderr
    for point in ("tree-written:1", "before-rename:2"):
        killed = life(tmp_path, tmp_path / "killed", point, **settings)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert steps_of(tmp_path / "killed")[-1] < 4
    resumed = life(tmp_path, tmp_path / "killed", **settings)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step" in resumed.stderr
    assert_same_end(tmp_path / "killed", tmp_path / "whole")
    record(
        "runs", "a run killed twice while saving, against the undisturbed one", "bit for bit", "bit for bit"
    )


@pytest.fixture(scope="module")
def arc(shared_data):
    return shared_data / "llm_adapters" / "ARC-Easy"


@pytest.fixture(scope="module")
def tuned(folder, arc, tmp_path_factory):
    """A workdir of a MiLoRA on the first real rows, scored before and after."""
    work = tmp_path_factory.mktemp("tuned")
    rows = json.loads((arc / "train.json").read_text())[:400]
    (work / "train.json").write_text(json.dumps(rows))
    values = {
        "model.path": folder,
        "data.train": work / "train.json",
        "data.test": f"arc={arc / 'test.json'}",
        "data.max_length": 256,
        "data.special_tokens": "tokenizer",
        "data.dev_limit": 12,
        "train.max_steps": LEARNT,
        "train.batch_size": 4,
        "train.eval_every": LEARNT,
        "train.save_every": LEARNT,
        "train.coefficient_every": LEARNT,
        "train.learning_rate": 2e-3,
        "eval.limit": LIMIT,
        "eval.batch_size": 4,
        "eval.max_new_tokens": NEW,
        "adapter.rank": 8,
    }
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    command = ["train.py", "--config", "configs/tiny.py", f"--workdir={work / 'run'}", *flags]
    ran(*command)
    return work / "run"


def ran(*command):
    """What a command of ours prints."""
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment(XLA_FLAGS=""),  # their speed is measured
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def assert_their_texts(model, tokenizer, questions, predictions):
    """The answers in a predictions file are transformers' own greedy texts."""
    answered = [json.loads(line)["generated"] for line in predictions.read_text().splitlines()]
    assert len(answered) == len(questions)
    for question, found in zip(questions, answered, strict=True):
        ids = tokenizer(prompt_text(question))["input_ids"]
        assert found.strip() == text_of(tokenizer, their_answer(model, tokenizer, ids, NEW)).strip()


def test_base_and_tuned_are_scored_by_the_texts_that_torch_writes(
    folder, run, theirs, arc, tuned, tmp_path, record
):
    summary = json.loads((tuned / "summary.json").read_text())
    questions = read_records(Source("arc", str(arc / "test.json")))[:LIMIT]
    asked = ["--limit", LIMIT, "--max-new-tokens", NEW, "--batch-size", 4, "--predictions", tmp_path / "base"]
    data = ["--data", f"arc={arc / 'test.json'}"]
    command = ("-m", "milora_jax.evaluation", "--base", folder, *data, *asked)
    scored = json.loads(ran(*command))
    assert scored["accuracy"] == summary["accuracy"]["base"]
    assert_their_texts(theirs, run.tokenizer, questions, tmp_path / "base")
    export_milora(tuned, tmp_path / "out")
    reader = attach(theirs, tmp_path / "out")
    try:
        assert_their_texts(theirs, run.tokenizer, questions, tuned / "predictions.jsonl")
    finally:
        reader.detach()
    for kind in ("base", "adapter"):
        record("runs", f"ARC-Easy, {LIMIT} rows, accuracy: {kind}", summary["accuracy"][kind]["arc"])
    record("runs", f"dev perplexity after {LEARNT} steps of 4 rows", summary["dev_perplexity"])
    record("runs", "answers that torch writes too, of the base and of the tuned model", f"{2 * LIMIT}", "all")


def measured(what, methods, *sizes):
    """Tokens per second by method: medians of five, one after the other in every round."""
    command = ("-m", "milora_jax.bench", what, "--method", ",".join(methods), "--repeats", 5, *sizes)
    lines = [json.loads(line) for line in ran(*command).splitlines()]
    return {line["method"]: line["tok_s"] for line in lines}


@pytest.mark.parametrize(
    ("what", "methods", "sizes"),
    [
        ("decode", ("none", "milora", "hf", "peft-lora"), ("--prompt", 64, "--new", 32)),
        ("train", ("milora", "lora", "peft-lora"), ("--batch", 2, "--seq", 128)),
    ],
)
def test_speed_beside_hugging_face(folder, record, what, methods, sizes):
    """Figures only."""
    speeds = measured(what, methods, "--model", folder, "--rank", 16, *sizes)
    assert speeds.keys() == set(methods)
    said = "decoding one prompt" if what == "decode" else "training steps of 2 x 128 tokens"
    for method, speed in speeds.items():
        record("speed", f"{said}, {method}: tokens per second", speed)
    for ours, peer in (("none", "hf"), ("milora", "peft-lora"), ("lora", "peft-lora")):
        if ours in speeds and peer in speeds:
            record("speed", f"{said}: {ours} over {peer}", speeds[ours] / speeds[peer])
