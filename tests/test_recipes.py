"""The files in ``configs/recipes/``: each can be loaded and read, stands in the docs, and runs."""

import json
import subprocess
import sys

import pytest

from milora_jax.adapters.registry import build_method
from milora_jax.commands.config_options import read_config_file
from milora_jax.data.tokens import encode_example, load_tokenizer
from milora_jax.tiny.recipes import make_chats, make_texts
from milora_jax.training.rows import read_rows
from tests.paths import ROOT, environment

pytest.importorskip("transformers", reason="text needs a tokenizer, which the core does without")
pytest.importorskip("ml_collections", reason="train.py reads its configs with it")

FOLDER = ROOT / "configs" / "recipes"
RECIPES = {
    "chat": {"train": 500, "dev": 13, "test": 33},
    "classification": {"train": 1500, "dev": 40, "test": 100},
    "plain_text": {"train": 250, "dev": 6},
    "preferences": {"train": 400, "dev": 40},
    "preferences_after_sft:sft": {"train": 1500, "dev": 40},
    "preferences_after_sft": {"train": 400, "dev": 40},
}
"""Recipes and the rows that each has."""


def file_of(name):
    path, colon, words = name.partition(":")
    return f"{FOLDER / path}.py{colon}{words}"


def test_every_file_is_one_of_them():
    assert {path.stem for path in FOLDER.glob("*.py")} == {name.split(":")[0] for name in RECIPES}


@pytest.mark.thorough
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_config_whose_rows_can_be_read(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = read_config_file(file_of(name))
    build_method(config.adapter)
    rows = read_rows(config)
    turns = 3 if name == "chat" else 1
    read = {"train": len(list(rows.train)), "dev": sum(len(list(each)) for each in rows.dev)}
    read |= {"test": sum(map(len, rows.tests.values()))} if rows.tests else {}
    assert read == {split: count * turns for split, count in RECIPES[name].items()}
    assert f"python train.py --config configs/recipes/{name.replace(':', '.py:')}" in (
        ROOT / "docs/tuning.md"
    ).read_text("utf-8")
    assert read_config_file(file_of(name)) == config


def test_the_chat_template_writes_the_chats(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = read_config_file(file_of("chat"))
    tokenizer = load_tokenizer(config.model.path)
    first, second, _ = list(read_rows(config).train)[:3]
    eos = tokenizer.eos_token_id
    example = encode_example(tokenizer, second, [eos], 160, config.prompt_format)
    assert example is not None
    written = tokenizer.decode(example.tokens).replace("s> ", "s>")  # the tokenizer's own spaces
    assert written == (
        "<s>Answer with more or less.\n"
        f"\nQuestion: {first.instruction}\nAnswer: {first.output}</s>"
        f"\nQuestion: {second.instruction}\nAnswer: {second.output}</s>"
    )
    assert example.tokens[-1] == eos
    assert tokenizer.decode(example.tokens[: example.route_tokens]).endswith(first.instruction)


def test_the_inputs_are_the_embedded_rows_together():
    (chat,) = make_chats("dev")[:1]
    assert [message["role"] for message in chat["messages"]] == ["system", *("user", "assistant") * 3]
    (text,) = make_texts("dev")[:1]
    assert text["text"].count("The answer is") == 6


QUICK = ("train.max_steps=4", "train.eval_every=2", "train.save_every=2", "train.coefficient_every=2")


@pytest.mark.thorough
def test_recipes_run(tmp_path):
    """With few steps, each in a process of its own as a person starts it."""
    for name, rows in RECIPES.items():
        if name == "preferences":
            continue  # tests/training/test_preference_runs.py
        workdir = tmp_path / ("runs/sft" if name.endswith(":sft") else name)
        flags = [f"--config.{setting}" for setting in (*QUICK, "train.batch_size=8", "eval.limit=4")]
        command = [
            sys.executable,
            ROOT / "train.py",
            "--config",
            file_of(name),
            f"--workdir={workdir}",
            *flags,
        ]
        run = subprocess.run(
            command, cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True
        )
        assert run.returncode in (0, 4), f"{name}: {run.stderr}"  # 4: nothing was learned in so few steps
        summary = json.loads((workdir / "summary.json").read_text())
        assert summary["steps"] == 4
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        assert sum("dev_perplexity" in line for line in lines) == 2
        assert ("accuracy" in summary) == ("test" in rows)
