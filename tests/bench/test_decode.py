"""The benchmark measures what it says, on a model small enough for a test; no time is asserted."""

import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from milora_jax.bench.models import random_base, streamed_bytes
from milora_jax.commands.bench import main
from milora_jax.errors import UserError
from milora_jax.model_config import LLAMA2_7B
from tests.models import TINY, WITH_TOKENIZER, write_hf_directory

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_hf_directory(folder, dataclasses.replace(WITH_TOKENIZER, num_layers=2), tokenizer=False)
    return folder


def bench(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "milora_jax.bench", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_one_object_per_variant_with_its_figures(folder):
    found = bench(
        *("decode", "--model", folder, "--method", "none,milora,dora-recomputed", "--batch", "1,2"),
        *("--prompt", 5, "--new", 9, "--rank", 4, "--repeats", 2),
    )
    assert found.returncode == 0, found.stderr
    figures = [json.loads(line) for line in found.stdout.splitlines()]
    assert [(f["method"], f["batch"], f["top_k"]) for f in figures] == [
        (method, batch, 3 if method == "milora" else 0)
        for method in ("none", "milora", "dora-recomputed")
        for batch in (1, 2)
    ]
    for each in figures:
        assert each["tok_s"] > 0
        assert each["tok_s"] == pytest.approx(each["batch"] * 9 / statistics.median(each["seconds"]))
        assert each["ms_per_step"] == pytest.approx(1e3 * each["batch"] / each["decode_tok_s"])
        assert len(each["seconds"]) == 2
        assert each["versions"]["jax"] == jax.__version__
        assert (each["adapter_bytes"] > 0) == (each["method"] != "none")
        # Keys and values of a prompt of 5 and half of 9, two heads of 8, two layers, float32.
        assert each["cache_bytes"] == each["batch"] * int(2 * (5 + 4.5) * 2 * 2 * 8 * 4)


@pytest.mark.slow
def test_beams_and_tenants(folder):
    common = ("decode", "--model", folder, "--prompt", 5, "--new", 4, "--rank", 8, "--repeats", 1)
    beams = bench(*common, "--method", "milora", "--beams", "1,3")
    assert [json.loads(line)["beams"] for line in beams.stdout.splitlines()] == [1, 3], beams.stderr
    tenants = bench(*common, "--method", "milora", "--batch", 3, "--tenants", "1,3", "--path", "one_hot")
    paths = [json.loads(line)["path"] for line in tenants.stdout.splitlines()]
    assert paths == ["one", "one_hot"], tenants.stderr


@pytest.mark.parity
@pytest.mark.parametrize("more", [("--beams", "3"), ("--batch", "3", "--tenants", "2")])
def test_the_peer_is_measured_beside_us(folder, more):
    found = bench(
        *("decode", "--model", folder, "--method", "hf,peft-lora,milora", *more),
        *("--prompt", 5, "--new", 4, "--rank", 8, "--repeats", 1),
    )
    assert found.returncode == 0, found.stderr
    figures = {each["method"]: each for each in map(json.loads, found.stdout.splitlines())}
    assert set(figures) == {"hf", "peft-lora", "milora"}
    assert all(each["tok_s"] > 0 for each in figures.values())
    assert figures["peft-lora"]["versions"]["peft"]
    assert figures["peft-lora"]["adapter_bytes"] is None


@pytest.mark.parity
def test_random_weights_of_the_peer_are_made_where_they_stay():
    found = bench(
        *("decode", "--model", "random:llama-30m", "--method", "peft-lora"),
        *("--prompt", 5, "--new", 4, "--rank", 8, "--repeats", 1),
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["tok_s"] > 0


@pytest.mark.thorough
def test_a_peer_that_cannot_start_is_one_line(folder, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho hello >&2\necho 'No module named torch' >&2\nexit 1\n")
    broken.chmod(0o755)
    common = ("decode", "--model", folder, "--method", "peft-lora", "--peer-python")
    for python, message in ((broken, "'No module named torch'"), (tmp_path / "no", "No such file")):
        found = bench(*common, python)
        assert found.returncode == 2
        assert message in found.stderr.splitlines()[-1]
        assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "--model 'nowhere': no such directory"),
        (["--model", "random:gpt"], "expected random: and one of llama2-7b"),
        (["--model", "{folder}", "--method", "milora,fast"], "--method is 'fast'"),
        (["--model", "{folder}", "--new", "9999"], "expected at most 512 together"),
        (["--model", "{folder}", "--batch", "0"], "--batch is 0"),
    ],
)
def test_a_mistake_is_refused(folder, arguments, message):
    with pytest.raises(UserError) as found:
        main(["decode", *[argument.format(folder=folder) for argument in arguments]])
    assert message in str(found.value)
    assert "\n" not in str(found.value)


def test_a_mistake_is_one_line():
    found = bench("speed")
    assert found.returncode == 2
    assert "'speed': expected one of decode" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.thorough
def test_random_weights_have_the_shape_of_the_model():
    abstract = jax.eval_shape(lambda: random_base(LLAMA2_7B, "bfloat16", decode=True))
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == 6_738_415_616
    base = random_base(TINY, "float32", decode=True)
    embedding = TINY.vocab_size * TINY.hidden_size * 4
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(base)) - embedding
    assert streamed_bytes(base, TINY, 1) == whole


def test_a_step_reads_the_experts_that_its_rows_choose():
    config = dataclasses.replace(TINY, num_experts=8, experts_per_token=2, family="olmoe", qk_norm=True)
    config = dataclasses.replace(config, qk_norm_all_heads=True)
    base = random_base(config, "float32", decode=True)
    expert = 3 * config.hidden_size * config.intermediate_size * 4 * config.num_layers
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(base))
    rest = whole - config.vocab_size * config.hidden_size * 4 - 8 * expert
    assert streamed_bytes(base, config, 1) == rest + 2 * expert
    assert streamed_bytes(base, config, 2) == rest + 3.5 * expert  # 8 (1 - 0.75^2)
