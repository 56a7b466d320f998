"""A whole run as a person makes it: train, look at what it wrote, evaluate, load, generate."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import milora_jax
import train
from milora_jax.commands import evaluation, generation
from milora_jax.data.tokens import load_tokenizer
from milora_jax.errors import UserError
from tests.models import WITH_TOKENIZER, write_hf_directory

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_hf_directory(folder / "model")
    rows = [{"instruction": f"{i} + 1", "output": f"It is {i + 1}", "answer": f"{i + 1}"} for i in range(40)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    maths = {"question": "How many?", "answer": "Two <<1+1=2>>2.\n#### 2"}
    (folder / "maths.jsonl").write_text((json.dumps(maths) + "\n") * 10)
    return folder


def run_training(folder, workdir, monkeypatch, *more):
    train_in(folder, workdir, monkeypatch, *more)
    return json.loads((workdir / "summary.json").read_text())


def train_in(folder, workdir, monkeypatch, *more):
    settings = (
        f"--config.model.path={folder / 'model'}",
        f"--config.data.train={folder / 'sums.jsonl'},{folder / 'maths.jsonl'}",
        "--config.data.dev=",
        f"--config.data.test={folder / 'sums.jsonl'},gsm8k={folder / 'maths.jsonl'}",
        "--config.data.max_length=512",
        "--config.adapter.rank=2",
        "--config.train.batch_size=8",
        "--config.train.max_steps=6",
        "--config.train.eval_every=2",
        "--config.train.log_every=1",
        "--config.train.coefficient_every=2",
        "--config.mesh.fsdp=2",
        "--config.eval.limit=9",
        "--config.eval.batch_size=8",
        "--config.eval.max_new_tokens=5",
        *more,
    )
    argv = ["train.py", "--config", str(ROOT / "configs/tiny.py"), f"--workdir={workdir}", *settings]
    monkeypatch.setattr(sys, "argv", argv)
    train.main()


@pytest.fixture(scope="module")
def workdir(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("work") / "w"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_training(folder, workdir, monkeypatch)
    return workdir


def test_what_a_run_writes(workdir):
    names = {path.name for path in workdir.iterdir()}
    wanted = {"config.json", "metrics.jsonl", "checkpoints", "best", "routing.png", "summary.json"}
    assert wanted <= names
    summary = json.loads((workdir / "summary.json").read_text())
    for which in ("base", "adapter"):
        shares = summary["accuracy"][which]
        assert shares.keys() == {"sums", "gsm8k", "mean"}
        assert all(0 <= share <= 1 for share in shares.values())
        for name in ("loss", "perplexity"):
            assert summary[name][which].keys() == {"sums", "gsm8k"}
        for task, loss in summary["loss"][which].items():
            assert summary["perplexity"][which][task] == pytest.approx(math.exp(loss))
    assert summary["loss"]["adapter"]["sums"] < summary["loss"]["base"]["sums"]
    assert {task: rows["scored"] for task, rows in summary["loss_rows"].items()} == {"sums": 9, "gsm8k": 9}
    assert summary["measures"] == {"base": {}, "adapter": {}}
    assert summary["steps"] == 6
    assert summary["best_step"] in (2, 4, 6)
    assert summary["tokens_per_second"] > 0
    assert summary["wall_seconds"] > 0
    dims = WITH_TOKENIZER.module_dims.values()
    experts = WITH_TOKENIZER.num_layers * 2 * sum(a + b for a, b in dims)
    router = WITH_TOKENIZER.num_layers * (32 + 32 * 7 + 7 + 5)
    assert summary["tunable_parameters"] == experts + router
    assert 0 < summary["mean_active_parameters"] < experts
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "dev_perplexity" in line] == [2, 4, 6]
    best = min(line["dev_perplexity"] for line in lines if "dev_perplexity" in line)
    assert summary["dev_perplexity"] == pytest.approx(best)
    predictions = [json.loads(line) for line in (workdir / "predictions.jsonl").read_text().splitlines()]
    assert [p["task"] for p in predictions] == ["sums"] * 9 + ["gsm8k"] * 9


@pytest.mark.thorough
def test_the_evaluation_command_repeats_the_figures(workdir, folder, monkeypatch, capsys, tmp_path):
    summary = json.loads((workdir / "summary.json").read_text())
    where = ["--workdir", str(workdir), "--predictions", str(tmp_path / "p.jsonl"), "--limit", "9"]
    monkeypatch.setattr(sys, "argv", ["evaluation", *where])
    evaluation.main()
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == {"sums": 9, "gsm8k": 9}
    assert found["accuracy"] == summary["accuracy"]["adapter"]
    assert found["loss"] == pytest.approx(summary["loss"]["adapter"], rel=1e-5)
    assert found["loss_rows"] == summary["loss_rows"]
    again = (tmp_path / "p.jsonl").read_text()
    assert again == (workdir / "predictions.jsonl").read_text()
    one = ["--data", str(folder / "maths.jsonl"), "--task", "svamp", "--limit", "2", "--fresh"]
    monkeypatch.setattr(sys, "argv", ["evaluation", *where[:4], *one])
    evaluation.main()
    assert json.loads(capsys.readouterr().out)["rows"] == {"SVAMP": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir", "nowhere"], "'nowhere' is no workdir"),
        (["--workdir", "{workdir}", "--data", "no.jsonl"], "no.jsonl: no such file"),
        (["--workdir", "{workdir}", "--limit", "-1"], "eval.limit is -1"),
        (["--workdir", "{workdir}", "--task", "x"], "no task is called 'x'"),
        (["--workdir", "{workdir}", "--predictions", "no/p.jsonl"], "no such directory as 'no'"),
    ],
)
def test_the_evaluation_command_refuses_bad_input(workdir, monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["evaluation", *(a.format(workdir=workdir) for a in arguments)])
    with pytest.raises(UserError) as caught:
        evaluation.main()
    assert message in str(caught.value)


@pytest.mark.thorough
def test_the_generation_command_takes_a_run_on_its_own_base_only(
    workdir, folder, monkeypatch, capsys, tmp_path
):
    ask = ["generation", "--prompt", "add 1 and 2", "--max-new-tokens", "3", "--json"]
    monkeypatch.setattr(sys, "argv", [*ask, "--workdir", str(workdir)])
    generation.main()
    found = json.loads(capsys.readouterr().out)
    assert len(found["route"]) == WITH_TOKENIZER.num_layers
    monkeypatch.setattr(sys, "argv", [*ask, "--base", str(folder / "model"), "--adapter", str(workdir)])
    generation.main()
    assert json.loads(capsys.readouterr().out) == found
    write_hf_directory(tmp_path, seed=1)
    monkeypatch.setattr(sys, "argv", [*ask, "--base", str(tmp_path), "--adapter", str(workdir)])
    with pytest.raises(UserError, match="are not those that the adapter of"):
        generation.main()


@pytest.mark.slow
def test_a_run_on_a_quantised_base(folder, tmp_path, monkeypatch, capsys):
    """Trained, scored and continued on the base as the run kept it, which cannot be changed on the way."""
    workdir = tmp_path / "w"
    summary = run_training(folder, workdir, monkeypatch, "--config.model.quantize=int8")
    assert summary["dev_perplexity"] > 1
    again = ["--workdir", str(workdir), "--limit", "9", "--predictions", str(tmp_path / "p")]
    monkeypatch.setattr(sys, "argv", ["evaluation", *again])
    capsys.readouterr()
    evaluation.main()
    assert json.loads(capsys.readouterr().out)["accuracy"] == summary["accuracy"]["adapter"]
    assert (tmp_path / "p").read_text() == (workdir / "predictions.jsonl").read_text()
    ask = ["generation", "--prompt", "add 1 and 2", "--max-new-tokens", "8", "--json", "--logprobs", "1"]

    def continued(*more):
        monkeypatch.setattr(sys, "argv", [*ask, *more])
        generation.main()
        return json.loads(capsys.readouterr().out)

    theirs = continued("--workdir", str(workdir))
    base = ("--base", str(folder / "model"), "--adapter", str(workdir))
    assert continued(*base) == theirs
    assert continued(*base, "--quantize", "none") != theirs
    with pytest.raises(UserError, match=r"model\.quantize"):
        run_training(folder, workdir, monkeypatch, "--config.model.quantize=none")


@pytest.mark.thorough
def test_the_verbs_of_the_package(workdir, folder, tmp_path):
    base, config = milora_jax.load_base(folder / "model")
    adapter = milora_jax.load_adapter(workdir)
    assert adapter.method.rank == 2
    tokenizer = load_tokenizer(str(folder / "model"))
    prompts = ["one", "a much longer prompt about nothing at all", "two"]
    plain = milora_jax.generate(base, config, tokenizer, prompts, max_new_tokens=4)
    adapted = milora_jax.generate(base, config, tokenizer, prompts, adapter=adapter, max_new_tokens=4)
    assert [answer.route is None for answer in plain] == [True] * 3
    for answer in adapted:
        assert answer.route.shape == (config.num_layers, 7)
        assert ((answer.route != 0).sum(axis=1) == 3).all()
        assert 1 <= len(answer.tokens) <= 4
    alone = milora_jax.generate(base, config, tokenizer, prompts[1:2], adapter=adapter, max_new_tokens=4)
    assert alone[0].text == adapted[1].text
    np.testing.assert_array_equal(alone[0].route, adapted[1].route)
    other = dataclasses.replace(config, num_layers=config.num_layers - 1)
    with pytest.raises(UserError, match="the adapter fits a base of 2 layers"):
        milora_jax.generate(base, other, tokenizer, prompts, adapter=adapter)
    for bad, message in (
        ([" "], "prompt 0: the prompt is empty"),
        (["x" * 600], "prompt 0: the prompt has 6"),
        ("one", "prompts is 'one'"),
    ):
        with pytest.raises(UserError, match=message):
            milora_jax.generate(base, config, tokenizer, bad)
    with pytest.raises(UserError, match="no such directory"):
        milora_jax.load_adapter(tmp_path / "no")
    with pytest.raises(UserError, match="holds no complete adapter"):
        milora_jax.load_adapter(tmp_path)


@pytest.mark.parametrize("older", [False, True])
def test_a_damaged_adapter_is_refused_by_name(workdir, tmp_path, older):
    shutil.copytree(workdir / "best", tmp_path / "best")
    (newest,) = (path for path in (tmp_path / "best").iterdir() if path.name.isdigit())
    if older:  # a good one must not be taken for the damaged one unasked
        shutil.copytree(newest, newest.with_name(str(int(newest.name) - 1)))
        milora_jax.load_adapter(tmp_path / "best")
    part = next(path for path in newest.rglob("d/*") if path.is_file())
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(UserError, match=r"holds no complete adapter: step \d of .* is damaged"):
        milora_jax.load_adapter(tmp_path / "best")


@pytest.mark.slow
def test_patience_stops_early_and_the_best_is_kept(folder, tmp_path, monkeypatch):
    settings = (
        "--config.train.learning_rate=0",
        "--config.train.coefficient_learning_rate=0",
        "--config.data.pack=true",
        "--config.train.accumulate=2",
        "--config.train.batch_size=16",
        "--config.train.remat=full",
    )
    more = (*settings, "--config.train.patience=2", "--config.train.max_steps=40", "--config.data.test=")
    summary = run_training(folder, tmp_path / "w", monkeypatch, *more)
    assert (summary["steps"], summary["best_step"]) == (6, 2)
    assert "accuracy" not in summary


@pytest.mark.slow
def test_the_first_command_of_the_readme(tmp_path):
    command = [sys.executable, "train.py", "--config", "configs/tiny.py", f"--workdir={tmp_path}"]
    # The tests' own flags switch the optimiser of XLA off.
    plain = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run(command, cwd=ROOT, check=True, timeout=1800, env=plain)
    accuracy = json.loads((tmp_path / "summary.json").read_text())["accuracy"]
    assert accuracy["base"]["mean"] < 0.2
    assert accuracy["adapter"]["mean"] > 0.8
