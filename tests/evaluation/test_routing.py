"""Routes of prompts by prefill alone, what is measured of them, and the command that draws them."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.base.load import load_base
from milora_jax.base.transformer import adapter_decode_layout
from milora_jax.commands import evaluation
from milora_jax.commands.storage import main as storage
from milora_jax.data.batches import collate_prompts
from milora_jax.data.tokens import load_tokenizer
from milora_jax.errors import UserError
from milora_jax.evaluation.routing import (
    Routes,
    _routes,
    distance,
    distances,
    letters_of,
    measure,
    route_prompts,
    summary_lines,
)
from milora_jax.generation.adapter_stack import AdapterStack
from milora_jax.generation.decode import prefill
from milora_jax.storage.adapters import load_adapter
from tests.models import WITH_TOKENIZER, write_hf_directory
from tests.storage.adapters import run_of

pytest.importorskip("transformers", reason="prompts need a tokenizer, which the core does without")

PICTURES = {"shares.png", "decisions.png", "distances.png", "strips.png"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a run of MiLoRA and one of LoRA on it, and two files of records."""
    folder = tmp_path_factory.mktemp("routing")
    write_hf_directory(folder / "model")
    for method in ("milora", "lora"):
        (folder / method).mkdir()
        run_of(folder / method, folder / "model", method)
    for name, text in (("sums", "add {0} and {0}"), ("words", "write the word number {0} of this list")):
        rows = [{"instruction": text.format(i), "output": "x", "answer": "x"} for i in range(7)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["evaluation", "routing", *map(str, arguments)])
    evaluation.main()


def one_hot(*chosen, prompts=1):
    """Routes of one layer and one expert: each prompt chooses the expert of its number."""
    weights = np.eye(7, dtype=np.float32)[list(chosen) * prompts][:, None]
    return Routes(weights, 0.4 * weights + 0.6 / 7)


@pytest.mark.thorough
def test_the_routes_are_those_of_generation(folder):
    base, config = load_base(folder / "model", decode=True)
    adapter = load_adapter(folder / "milora")
    tokenizer = load_tokenizer(str(folder / "model"))
    texts = ["one", "a much longer prompt about nothing at all", "two", "three and four", "five"]
    prompts = [tokenizer.encode(text) for text in texts]
    done = []
    found = route_prompts(base, config, adapter, prompts, rows=4, progress=done.append)
    tenants, slot = AdapterStack.single(adapter_decode_layout(adapter, base)), jnp.int32(0)
    for prompt, weights in zip(prompts, found.weights, strict=True):
        batch = jax.device_put(collate_prompts([prompt], 64, 0, 1))
        alone, _ = prefill(base, tenants, slot, batch, config, cache_length=64)
        np.testing.assert_array_equal(weights, np.stack(alone.route)[:, 0, 0])
    np.testing.assert_allclose(found.probs.sum(axis=-1), 1.0, rtol=1e-6)
    assert sum(done) == len(prompts)
    stacked = route_prompts(load_base(folder / "model")[0], config, adapter, prompts, rows=4)
    np.testing.assert_array_equal(stacked.weights, found.weights)


def test_there_is_one_program_per_length(folder):
    base, config = load_base(folder / "model")
    adapter = load_adapter(folder / "milora")
    _routes.clear_cache()
    route_prompts(base, config, adapter, [[5] * length for length in (3, 9, 20, 31, 32)], rows=2)
    assert _routes._cache_size() == 1
    route_prompts(base, config, adapter, [[5] * length for length in (3, 33, 60)], rows=2)
    assert _routes._cache_size() == 2


def test_what_cannot_be_routed_is_refused(folder):
    base, config = load_base(folder / "model")
    adapter = load_adapter(folder / "milora")
    for prompts, message in (
        ([], "prompts is 0: expected at least one"),
        ([[5], []], "prompt 1: its length in tokens is 0"),
        ([[5] * (config.max_positions + 1)], f"expected 1 to {config.max_positions}"),
    ):
        with pytest.raises(UserError, match=message):
            route_prompts(base, config, adapter, prompts)


def test_measures_of_known_routes():
    found = measure("four", one_hot(0, 0, 0, 2))
    np.testing.assert_allclose(found.share[0], [0.75, 0, 0.25, 0, 0, 0, 0])
    np.testing.assert_allclose(found.agreement, [0.75])
    np.testing.assert_allclose(found.margin, [0.4], rtol=1e-5)
    p = np.array([0.4 + 0.6 / 7, *[0.6 / 7] * 6])
    np.testing.assert_allclose(found.entropy, [-(p * np.log(p)).sum()], rtol=1e-5)
    assert (found.prompts, found.top_k) == (4, 1)
    assert letters_of(np.eye(7)[[4, 6]]) == "G D"


def test_distances_of_known_routes():
    table = distances({"a": one_hot(0, 0, 1, 1), "b": one_hot(2, prompts=4), "one": one_hot(0)})
    assert table[0, 1] == table[1, 0] == pytest.approx(1.0)
    assert table[0, 0] == table[1, 1] == table[2, 2] == 0.0
    half = np.array([0.5, 0.5]), np.array([1.0, 0.0])
    middle = (half[0] + half[1]) / 2
    expected = sum((p[p > 0] * np.log2(p[p > 0] / middle[p > 0])).sum() for p in half) / 2
    assert table[0, 2] == pytest.approx(expected)
    assert distance(*(np.array([[*each, 0, 0, 0, 0, 0]]) for each in half)) == pytest.approx(expected)
    assert distances({"a": one_hot(0, 1, 0, 1)})[0, 0] == pytest.approx(1.0), "halves that share nothing"


def test_the_summary_says_whether_the_papers_limit_holds():
    balanced = measure("even", one_hot(0, 1, 2, 3))
    lines = "\n".join(summary_lines([balanced], np.zeros((1, 1))))
    assert "no expert above 30% of a layer's choices: yes (largest 25%: Q in layer 0, even)" in lines
    assert "alike" not in lines
    both = {"even": one_hot(0, 1, 2, 3), "odd": one_hot(4, 5)}
    found = [measure(task, routes) for task, routes in both.items()]
    lines = "\n".join(summary_lines(found, distances(both)))
    assert "no (largest 50%: G in layer 0, odd)" in lines
    assert "above it in 1 of 2 layers" in lines
    assert "most different routes: even and odd, distance 1.000 bits" in lines


@pytest.mark.thorough
def test_the_command_draws_and_tells(folder, tmp_path, monkeypatch, capsys):
    out, data = tmp_path / "out", ["--data", folder / "sums.jsonl", f"text={folder / 'words.jsonl'}"]
    run(monkeypatch, "--workdir", folder / "milora", *data, "--limit", 2, "--out", out)
    said = capsys.readouterr().out
    assert "no expert above 30% of a layer's choices" in said
    assert said.splitlines()[-1] == f"written to {out}"
    assert {path.name for path in out.iterdir()} == {*PICTURES, "routing.json"}
    for name in PICTURES:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    first = json.loads((out / "routing.json").read_text())
    assert first["tasks"].keys() == first["routes"].keys() == {"sums", "text"}
    for task in ("sums", "text"):
        share = np.array(first["tasks"][task]["share"])
        assert share.shape == (WITH_TOKENIZER.num_layers, 7)
        np.testing.assert_allclose(share.sum(axis=1), 1.0, atol=1e-3)
        assert [len(route.split()) for route in first["routes"][task]] == [WITH_TOKENIZER.num_layers] * 2


@pytest.mark.thorough
def test_an_export_has_the_routes_of_its_run(folder, tmp_path, monkeypatch):
    out, data = tmp_path / "out", ["--data", folder / "sums.jsonl", folder / "words.jsonl"]
    run(monkeypatch, "--workdir", folder / "milora", *data, "--out", out)
    first = json.loads((out / "routing.json").read_text())
    export = ["--out", str(tmp_path / "export"), "--format", "milora"]
    monkeypatch.setattr("sys.argv", ["storage", "export", "--workdir", str(folder / "milora"), *export])
    storage()
    shutil.copy(folder / "sums.jsonl", out / "mine.jsonl")
    exported = ["--adapter", tmp_path / "export", "--base", folder / "model"]
    run(monkeypatch, *exported, *data[:2], "--out", out)
    again = json.loads((out / "routing.json").read_text())
    assert again["tasks"] == {"sums": first["tasks"]["sums"]}, "the same routes; the older report is replaced"
    assert {path.name for path in out.iterdir()} == {*PICTURES, "routing.json", "mine.jsonl"}


MISTAKES = {
    "no subject": ([], "there is no base: expected a workdir, or a base and perhaps an adapter on it"),
    "two subjects": (["--workdir", "{run}", "--adapter", "{run}"], "a workdir or an adapter, not both"),
    "half a subject": (["--adapter", "{run}"], "there is no base: expected a workdir, or a base and perhaps"),
    "a base alone": (
        ["--base", "{model}", "--data", "{sums}"],
        "a plain base has no routes: expected --workdir DIR, or --adapter DIR and --base DIR",
    ),
    "no such base": (["--workdir", "{run}", "--base", "x", "--data", "{sums}"], "'x': no such directory"),
    "no run": (["--workdir", "nowhere"], "'nowhere' is no workdir"),
    "no data": (["--workdir", "{run}"], "there are no prompts to route: give --data FILE"),
    "no file": (["--workdir", "{run}", "--data", "no.jsonl"], "no.jsonl: no such file"),
    "no column": (
        ["--workdir", "{run}", "--data", "{sums}", "--columns", "system=ask"],
        "sums.jsonl:1: there is no column 'ask'",
    ),
    "no router": (["--workdir", "{lora}", "--data", "{sums}"], "method 'lora' has no router"),
    "a limit": (["--workdir", "{run}", "--limit", "-1"], "--limit is -1: expected 0 or more"),
    "no rows": (["--workdir", "{run}", "--batch-size", "0"], "--batch-size is 0: expected at least 1"),
    "a file for a folder": (
        ["--workdir", "{run}", "--data", "{sums}", "--limit", "1", "--out", "{sums}"],
        "cannot write",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(folder, monkeypatch, name):
    arguments, message = MISTAKES[name]
    paths = {"run": folder / "milora", "lora": folder / "lora", "sums": folder / "sums.jsonl"}
    paths["model"] = folder / "model"
    with pytest.raises(UserError) as caught:
        run(monkeypatch, *(argument.format(**paths) for argument in arguments))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
