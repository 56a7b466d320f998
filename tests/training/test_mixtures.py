"""Runs on weighted mixtures: the shares in an epoch, in memory, in files, packed, of pairs, and resumed."""

import dataclasses
import json
from collections import Counter

import jax
import numpy as np
import pytest

from milora_jax.config import Config
from milora_jax.data.batches import batch_rows
from milora_jax.errors import Preempted, UserError
from milora_jax.training.prepare import prepare_run, with_rows
from milora_jax.training.progress import planned_steps
from milora_jax.training.step import make_steps
from tests.models import write_hf_directory
from tests.training.short_runs import SHALLOW, SHORT, STEPS, STOP, fit, on_one_device, silent

pytest.importorskip("transformers", reason="text needs a tokenizer, which the core does without")

FEW, MANY = 6, 21


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of files, and a run on a small base, whose rows are replaced."""
    folder = tmp_path_factory.mktemp("mixtures")
    write_hf_directory(folder / "model", SHALLOW)
    for name, count in (("few", FEW), ("many", MANY), ("dev", 8)):
        plain = [
            {"instruction": f"{name} {i}", "input": "", "output": f"{i} {'x' * i}"} for i in range(count)
        ]
        pairs = [{"prompt": f"{name} {i}", "chosen": f"{i}", "rejected": f"{i} no"} for i in range(count)]
        write(folder / f"{name}.jsonl", plain)
        write(folder / f"{name}-pairs.jsonl", pairs)
    return folder, prepare_run(config_of(folder), None, silent)


def config_of(folder, kind="", weights="", objective="sft", **data):
    train = ",".join(f"{name}={folder / name}{kind}.jsonl" for name in ("few", "many"))
    dev = f"dev={folder}/dev{kind}.jsonl"
    return Config.from_dict(
        {
            "model": {"path": str(folder / "model")},
            "data": {"train": train, "dev": dev, "weights": weights, "max_length": 360, **data},
            "train": {**SHORT, "objective": objective},
            "adapter": {"rank": 4},
        }
    )


def shown(run, kind=slice(None)):
    """How often an epoch shows each example of a source, as it is iterated by steps."""
    rows = np.concatenate([batch_rows(0, step, len(run.train), 1) for step in range(len(run.train))])
    found = Counter()
    for number in rows:
        for example in run.train[int(number)][kind]:
            found[example.source, example.tokens.tobytes()] += 1
    return found


def shares(found):
    return {name: sum(n for (source, _), n in found.items() if source == name) for name in ("few", "many")}


@pytest.mark.parametrize("data", [{}, {"pack": True}])
def test_an_epoch_has_the_shares_in_memory_and_in_files(made, tmp_path, data):
    folder, run = made
    said = []
    memory = with_rows(run, config_of(folder, weights="few=2,many=1", **data), said.append)
    found = shown(memory)
    assert len(found) == FEW + MANY
    assert shares(found) == {"few": 2 * MANY, "many": MANY}
    assert set(found.values()) == {1, 2 * MANY // FEW}
    told = f"few 66.7% ({2 * MANY} of {FEW} rows), many 33.3% ({MANY} of {MANY} rows)"
    assert f"an epoch has {3 * MANY} examples: {told}" in said
    assert planned_steps(
        dataclasses.replace(memory.config.train, max_steps=0, epochs=1), len(memory.train)
    ) == (len(memory.train) // SHORT["batch_size"])
    if data:
        assert len(memory.train) < 3 * MANY
    for _ in ("made", "opened"):
        prepared = config_of(folder, weights="few=2,many=1", prepared_path=str(tmp_path), **data)
        files = with_rows(run, prepared, silent)
        for step in range(4):
            numbers = batch_rows(0, step, len(memory.train), 8)
            ours, theirs = (each.batch(each.train, numbers) for each in (files, memory))
            jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert len(list(tmp_path.iterdir())) == 1
    with_rows(run, config_of(folder, weights="few=1,many=1", prepared_path=str(tmp_path), **data), silent)
    assert len(list(tmp_path.iterdir())) == 1, "the files hold rows, which weights do not change"


@pytest.mark.parametrize("data", [{}, {"pack": True}])
def test_without_weights_every_row_stands_there_once_in_its_order(made, data):
    folder, run = made
    said = []
    plain = with_rows(run, config_of(folder, **data), said.append)
    assert not any("an epoch has" in line for line in said)
    assert set(shown(plain).values()) == {1}
    if not data:
        assert [row[0].tokens.tobytes() for row in plain.train] == [
            example.tokens.tobytes() for example in plain.train.examples
        ]
    even = with_rows(run, config_of(folder, weights=f"few={FEW},many={MANY}", **data), silent)
    for step in range(4):
        numbers = batch_rows(0, step, len(plain.train), 8)
        jax.tree.map(
            np.testing.assert_array_equal,
            even.batch(even.train, numbers),
            plain.batch(plain.train, numbers),
        )


@pytest.mark.parametrize("data", [{}, {"pack": True}])
def test_pairs_are_mixed_by_prompts(made, data):
    folder, run = made
    config = config_of(folder, "-pairs", "few=1,many=1", "dpo", **data)
    mixed = with_rows(run, config, silent)
    for answer in (0, 1):
        found = shown(mixed, slice(answer, None, 2))
        assert shares(found) == {"few": MANY, "many": MANY}
        assert sorted(set(found.values())) == [1, 3, 4]
    for row in mixed.train:
        for chosen, rejected in zip(row[::2], row[1::2], strict=True):
            assert (chosen.label, rejected.label) == (True, False)
            start = chosen.prompt_length
            np.testing.assert_array_equal(chosen.tokens[:start], rejected.tokens[:start])


def test_a_source_whose_rows_are_all_too_long_is_refused(made, tmp_path):
    long = write(tmp_path / "long.jsonl", [{"instruction": "x" * 900, "input": "", "output": "y"}])
    config = config_of(made[0], weights="few=1,long=1")
    rows = dataclasses.replace(config.data, train=f"few={made[0] / 'few.jsonl'},long={long}")
    with pytest.raises(UserError, match="source 'long' has no training row left"):
        with_rows(made[1], dataclasses.replace(config, data=rows), silent)


@pytest.mark.thorough
def test_a_run_on_a_mixture_resumes_to_the_same_bits(made, tmp_path):
    run = on_one_device(with_rows(made[1], config_of(made[0], weights="few=3,many=1", pack=True), silent))
    steps = make_steps(run.model, run.config.train, STEPS)
    whole = fit(run, steps, tmp_path / "whole").state
    with pytest.raises(Preempted):
        fit(run, steps, tmp_path / "cut", stop_after=STOP)
    resumed = fit(run, steps, tmp_path / "cut").state
    jax.tree.map(np.testing.assert_array_equal, whole.adapter.params, resumed.adapter.params)
    other = on_one_device(with_rows(made[1], config_of(made[0], pack=True), silent))
    different = fit(other, steps, tmp_path / "other").state
    leaves = [jax.tree.leaves(state.adapter.params) for state in (whole, different)]
    assert any(not np.array_equal(a, b) for a, b in zip(*leaves, strict=True))
