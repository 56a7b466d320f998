"""The modal route of prompts, and exports that hold it: a plain LoRA, or merged weights."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest

from milora_jax.commands.storage import main
from milora_jax.data.tokens import load_tokenizer
from milora_jax.errors import UserError
from milora_jax.evaluation.static_route import modal_route
from milora_jax.storage.adapters import load_adapter
from milora_jax.storage.export import export_merged
from milora_jax.storage.fixed import static_lora
from milora_jax.storage.imported import import_peft
from milora_jax.storage.merged import SHARD_BYTES
from milora_jax.storage.verify import findings
from milora_jax.types import EXPERTS
from tests.models import WITH_TOKENIZER, write_hf_directory
from tests.storage.adapters import hidden, run_of

pytest.importorskip("transformers", reason="prompts need a tokenizer, which the core does without")


def route(*chosen, weight=1.0):
    """A route of one layer per argument: a string of experts' initials, of weight ``weight``."""
    initials = {name[0]: i for i, name in enumerate(EXPERTS)}
    made = np.zeros((len(chosen), len(EXPERTS)), np.float32)
    for layer, letters in enumerate(chosen):
        made[layer, [initials[letter] for letter in letters]] = weight
    return made


def test_every_layer_takes_the_set_that_most_prompts_chose():
    found = modal_route([route("qk", "ou"), route("qk", "gd"), route("vo", "gd"), route("qv", "gd")])
    np.testing.assert_array_equal(found.weights, route("qk", "gd"))
    np.testing.assert_array_equal(found.share, [0.5, 0.75])
    assert found.prompts == 4


def test_an_expert_weighs_what_it_did_on_average_in_the_prompts_that_chose_the_set():
    found = modal_route([route("qk", weight=0.5), route("qk", weight=1.5), route("qv", weight=9.0)])
    np.testing.assert_array_equal(found.weights, route("qk"))


def test_of_equally_frequent_sets_the_one_with_the_more_popular_experts_counts():
    """q is in two sets, v in one: both sets have one prompt each."""
    for order in (("qk", "vo", "qu"), ("vo", "qu", "qk")):
        weights = modal_route([route(one) for one in order]).weights
        assert weights[0, 0] == 1
        assert weights[0, EXPERTS.index("v")] == 0


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model, the run of a MiLoRA on it, and records."""
    folder = tmp_path_factory.mktemp("static")
    write_hf_directory(folder / "model", dataclasses.replace(WITH_TOKENIZER, num_layers=2))
    run_of(folder / "run", folder / "model", "milora", alpha=2.0, gate="renormalized")
    rows = [{"instruction": f"say {i}", "input": "", "output": f"{i} {i}"} for i in range(5)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def command(inputs, monkeypatch):
    def run(out, kind, *more):
        given = ["export", "--workdir", inputs / "run", "--out", out, "--format", kind, *more]
        monkeypatch.setattr(sys, "argv", ["storage", *map(str, given)])
        main()

    return run


@pytest.mark.thorough
def test_a_static_export_is_the_adapter_on_its_modal_route(inputs, command, tmp_path, capsys):
    rows = inputs / "rows.jsonl"
    command(tmp_path / "static", "static", "--calibration", rows, "--limit", 4, "--max-new-tokens", 6)
    printed = capsys.readouterr().out
    assert "% of 4 greedy answers are the same" in printed
    assert "dev perplexity: base " in printed
    origin = json.loads((tmp_path / "static" / "export.json").read_text())["static"]
    weights = np.array(origin["weights"], np.float32)
    assert origin["prompts"] == 4
    assert ((weights != 0).sum(axis=1) == 3).all()
    measured = origin["measured"]
    assert measured["rows"] == 4
    assert 0 <= measured["same_answers"] <= 1
    perplexities = [measured[f"perplexity_{name}"] for name in ("base", "routed", "static")]
    assert len(set(perplexities)) == 3
    assert f"static {perplexities[2]:.3f}" in printed
    assert findings(tmp_path / "static", inputs / "model") == {tmp_path / "static": []}

    import_peft(tmp_path / "static", inputs / "model", tmp_path / "back")
    routed, lora = load_adapter(inputs / "run"), load_adapter(tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, lora.params, static_lora(routed, weights).params)
    expected = hidden(inputs / "model", routed, weights)
    np.testing.assert_allclose(hidden(inputs / "model", lora), expected, atol=1e-4)

    export_merged(inputs / "run", inputs / "model", tmp_path / "merged", weights, {}, SHARD_BYTES)
    np.testing.assert_allclose(hidden(tmp_path / "merged"), expected, atol=1e-4)
    assert load_tokenizer(str(tmp_path / "merged")).encode("say 1")


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("static", [], "format static fixes the route of a MiLoRA: give --calibration FILE"),
        (
            "merged",
            [],
            "method 'milora' routes every prompt: a fixed route needs --calibration FILE",
        ),
        ("static", ["--calibration", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        ("static", ["--calibration", "x.jsonl", "--limit", -1], "limit is -1: expected at least 0"),
        ("peft", ["--columns", "input=x"], "--columns is of format static or merged, not peft"),
        (
            "static",
            [
                "--calibration",
                "{inputs}/rows.jsonl",
                "--dev",
                "d={inputs}/rows.jsonl",
                "--columns",
                "d:system=x",
            ],
            r"rows.jsonl:1: there is no column 'x' as in data.columns 'd:system=x'",
        ),
        ("merged", ["--shard-bytes", 0], "shard_bytes is 0: expected at least 1"),
    ],
)
def test_a_mistake_is_told_before_anything_is_computed(kind, more, message, command, inputs, tmp_path):
    with pytest.raises(UserError, match=message):
        command(tmp_path / "out", kind, *(str(each).format(inputs=inputs) for each in more))
    assert not (tmp_path / "out").exists()
