"""Runs on plain texts: what a method needs of them, in memory, in files and packed, and what they learn."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from milora_jax.config import Config
from milora_jax.errors import UserError
from milora_jax.training.prepare import prepare_run, with_rows
from tests.doctor.runs import bad, looked_at
from tests.models import write_hf_directory
from tests.training.short_runs import SHALLOW, SHORT, silent

pytest.importorskip("transformers", reason="text needs a tokenizer, which the core does without")

TEXTS = [{"text": f"The number {i} is followed by {i + 1}. " * (1 + i % 4)} for i in range(20)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of files, and a run on a small base, whose rows are replaced."""
    folder = tmp_path_factory.mktemp("texts")
    write_hf_directory(folder / "model", SHALLOW)
    plain = [{"instruction": f"say {i}", "input": "", "output": f"{i}"} for i in range(20)]
    for name, rows in (("texts", TEXTS), ("plain", plain)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, prepare_run(config_of(folder, prompt_tokens=8), None, silent)


def config_of(folder, method="milora", train="texts", objective="sft", **data):
    files = ",".join(str(folder / f"{name}.jsonl") for name in train.split(","))
    values = {"train": files, "dev_share": 0.2, "max_length": 360, **data}
    return Config.from_dict(
        {
            "model": {"path": str(folder / "model")},
            "data": values,
            "train": {**SHORT, "objective": objective},
            "adapter": {"method": method, **({} if method in ("iapt", "p_tuning_v2") else {"rank": 8})},
        }
    )


@pytest.mark.parametrize("data", [{}, {"pack": True}])
def test_rows_of_texts_in_memory_and_in_files(data, made, tmp_path):
    folder, run = made
    said = []
    config = config_of(folder, max_length=64, prompt_tokens=24, **data)
    memory = with_rows(run, config, said.append)
    examples = [example for row in memory.train for example in row]
    assert {example.prompt_length for example in examples} == {24}
    assert max(len(example.tokens) for example in examples) == 64
    assert min(len(example.tokens) for example in examples) > 24
    assert len(examples) > len(TEXTS)
    assert any("pieces of at most 24 tokens are left out" in line for line in said)
    for _ in ("made", "opened"):
        prepared = dataclasses.replace(config.data, prepared_path=str(tmp_path))
        told = []
        files = with_rows(run, dataclasses.replace(config, data=prepared), told.append)
        assert files.token_fingerprint == memory.token_fingerprint
        assert [line for line in told if "made once" not in line] == said
        numbers = np.arange(min(8, len(memory.train)))
        batches = (each.batch(each.train, numbers) for each in (files, memory))
        jax.tree.map(np.testing.assert_array_equal, *batches)
    shorter = dataclasses.replace(prepared, prompt_tokens=4)
    with_rows(run, dataclasses.replace(config, data=shorter), silent)
    assert len(list(tmp_path.iterdir())) == 2, "a prompt of another length is another file"


@pytest.mark.parametrize("method", ["milora", "midora", "iapt"])
def test_a_method_that_reads_prompts_needs_some_tokens(method, made, tmp_path):
    expected = (
        rf"data\.prompt_tokens is 0: expected at least 1: .* method '{method}' reads the prompt of each"
    )
    for data in ({}, {"prepared_path": str(tmp_path)}):
        with pytest.raises(UserError, match=expected):
            with_rows(made[1], config_of(made[0], method, **data), silent)
    assert not list(tmp_path.iterdir())
    # Files that another method has made are no way around it.
    with_rows(made[1], config_of(made[0], "lora", prepared_path=str(tmp_path)), silent)
    with pytest.raises(UserError, match=expected):
        with_rows(made[1], config_of(made[0], method, prepared_path=str(tmp_path)), silent)


@pytest.mark.parametrize("method", ["lora", "p_tuning_v2", "moelora"])
def test_other_methods_learn_all_tokens_but_the_first(method, made):
    run = with_rows(made[1], config_of(made[0], method), silent)
    assert {example.prompt_length for row in run.train for example in row} == {1}
    run = with_rows(made[1], config_of(made[0], method, prompt_tokens=5), silent)
    assert {example.prompt_length for row in run.train for example in row} == {5}


def test_texts_and_questions_may_be_mixed(made):
    config = config_of(made[0], train="texts,plain", prompt_tokens=8, weights="texts=1,plain=1")
    run = with_rows(made[1], config, silent)
    prompts = {example.source: example.prompt_length for row in run.train for example in row}
    assert prompts["texts"] == 8
    assert prompts["plain"] > 8


def test_prompt_tokens_that_nothing_reads_are_refused(made):
    with pytest.raises(UserError, match=r"data\.prompt_tokens is 8: expected 0: no row is a plain text"):
        with_rows(made[1], config_of(made[0], train="plain", prompt_tokens=8), silent)
    with pytest.raises(UserError, match=r"data\.prompt_tokens is 360: expected from 0 to below data\.max_le"):
        config_of(made[0], prompt_tokens=360)
    with pytest.raises(UserError, match=r"texts\.jsonl:1: field 'chosen' holds nothing"):
        with_rows(made[1], config_of(made[0], objective="dpo", prompt_tokens=8), silent)


def test_the_doctor_cuts_texts_as_training_does_and_sees_what_is_missing(made):
    earlier = ("base", "tokenizer", "template", "rows")
    found = looked_at("tokens", config_of(made[0], max_length=64, prompt_tokens=8), after=earlier)
    assert [finding.level for finding in found] == ["ok", "ok"]
    assert "max 64 of data.max_length 64; 0 of" in found[0].text
    assert not bad(looked_at("overlap", config_of(made[0], prompt_tokens=8), after=earlier))
    with pytest.raises(UserError, match="method 'milora' reads the prompt of each"):
        looked_at("tokens", config_of(made[0]), after=earlier)
