"""Adapters go to the Hub and come back bit for bit; whatever the Hub refuses is one line."""

import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from milora_jax.adapters.registry import adapter_shape
from milora_jax.addresses import on_hub
from milora_jax.commands import storage
from milora_jax.config import Config, DataSection, EvalSection, ModelSection
from milora_jax.errors import TemporaryError, UserError, as_given
from milora_jax.evaluation.card import Card
from milora_jax.storage.adapters import load_adapter, read_adapter
from milora_jax.storage.export import export_milora, export_peft
from milora_jax.storage.files import json_bytes
from milora_jax.storage.imported import read_any_adapter
from milora_jax.training.start import starting_params
from tests.fake_hub import TOKEN, serving_hub
from tests.models import TINY
from tests.storage.adapters import assert_equal, flip, run_of

constants = pytest.importorskip("huggingface_hub.constants")

SUMMARY = {
    "steps": 40,
    "best_step": 30,
    "dev_perplexity": 2.5,
    "tunable_parameters": 1234,
    "accuracy": {"base": {"sums": 0.25, "mean": 0.25}, "adapter": {"sums": 0.75, "mean": 0.75}},
    "loss": {"base": {"sums": 3.0}, "adapter": {"sums": None}},
    "metric": {"base": {"sums": 1.0}, "adapter": {"sums": 2.5}},
    "measures": {"base": {"told": {"bleu": 1.0, "chrf": 2.0, "rouge_l": 3.0}}, "adapter": {}},
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that the library asks in the place of the real one, with a token."""
    with serving_hub() as (hub, address):
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture(scope="module")
def lora(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    run_of(folder, model, "lora")
    return folder


def put(hub, name, *folders, **files):
    """Commit the files of folders, and others; gives the address of the commit."""
    found = {each.replace("__", "."): text.encode() for each, text in files.items()}
    for folder in folders:
        found |= {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
    return hub.commit(name, found)


def push(*arguments):
    storage.main(["push", *map(str, arguments)])


def test_a_pushed_adapter_is_loaded_as_it_was(hub, run, capsys):
    push(run, "hf://me/math", "--private")
    assert capsys.readouterr().out.startswith("pushed to hf://me/math: http://127.0.0.1")
    assert [(name, private) for name, private in hub.made] == [("me/math", True)]
    files = hub.files("me/math")
    assert set(files) == {
        *("README.md", "milora_config.json", "experts.safetensors", "router.safetensors", "manifest.json")
    }
    assert_equal(load_adapter("hf://me/math"), load_adapter(run))


def test_a_second_push_replaces_the_adapter_and_nothing_else(hub, run, lora, capsys):
    """In one commit; what a person has written stays."""
    push(run, "hf://me/math")
    hub.files("me/math").update({"README.md": b"---\nlicense: mit\n---\nmine", "notes.txt": b"mine"})
    count = len(hub.repositories["me/math"])
    push(lora, "hf://me/math")
    assert "note: the repository has a README.md, which is left as it is" in capsys.readouterr().err
    assert len(hub.repositories["me/math"]) == count + 1
    files = hub.files("me/math")
    assert files["README.md"].endswith(b"mine")
    assert set(files) == {
        *("README.md", "notes.txt", "milora_config.json", "experts.safetensors", "manifest.json")
    }
    assert_equal(load_adapter("hf://me/math"), load_adapter(lora))


def test_a_revision_is_the_adapter_of_its_time(hub, run, lora, exported, tmp_path):
    first = put(hub, "me/math", exported)
    export_milora(lora, tmp_path / "lora")
    put(hub, "me/math", tmp_path / "lora")
    assert_equal(load_adapter(f"hf://me/math@{first}"), load_adapter(run))
    assert_equal(load_adapter(Path("hf://me/math")), load_adapter(lora))


def test_what_was_fetched_is_not_fetched_again(hub, exported, monkeypatch):
    """Nor is the Hub needed for it, which may be offline or ill."""
    put(hub, "me/math", exported)
    expected = load_adapter("hf://me/math")
    count = len(hub.fetched)
    assert count == len(list(exported.iterdir()))
    assert_equal(load_adapter("hf://me/math"), expected)
    hub.status = 503
    assert_equal(load_adapter("hf://me/math"), expected)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_equal(load_adapter("hf://me/math"), expected)
    assert len(hub.fetched) == count


def test_only_files_of_an_adapter_are_fetched(hub, exported, run):
    """Others of its repository would be taken for parts of it, or are no business of its reader."""
    others = dict.fromkeys(("README__md", "model__safetensors", "pytorch_model__bin", "optimizer__pt"), "x")
    put(
        hub,
        "me/math",
        exported,
        **others,
        config__json="{}",
        **{"checkpoint-5/adapter_model.safetensors": "x"},
    )
    assert_equal(load_adapter("hf://me/math"), load_adapter(run))
    assert set(hub.fetched) == {path.name for path in exported.iterdir()}


def test_an_adapter_of_peft_is_pushed_and_read(hub, lora, model, tmp_path, capsys):
    export_peft(lora, tmp_path / "peft", "meta-llama/Llama-3.2-1B")
    push(tmp_path / "peft", "hf://me/law", "--run", lora)
    card = hub.files("me/law")["README.md"].decode()
    assert 'base_model: "meta-llama/Llama-3.2-1B"' in card
    assert "library_name: peft" in card
    assert 'PeftModel.from_pretrained(model, "me/law")' in card
    adapter, _ = read_any_adapter(Path("hf://me/law"), model)  # as the server names it
    theirs = read_any_adapter(tmp_path / "peft", model)[0]
    assert_equal(adapter, theirs)
    storage.main(["import", "--peft", "hf://me/law", "--base", str(model), "--out", str(tmp_path / "in")])
    assert_equal(load_adapter(tmp_path / "in"), theirs)
    capsys.readouterr()
    storage.main(["verify", "hf://me/law", "--base", str(model)])
    assert capsys.readouterr().out == "hf://me/law  ok\n"
    with pytest.raises(UserError) as caught:
        load_adapter("hf://me/law")
    assert "'hf://me/law' is a PEFT adapter, which names no base" in as_given(caught.value)


def test_one_of_several_adapters_is_a_folder(hub, lora, model, tmp_path):
    for name in ("law", "math"):
        export_peft(lora, tmp_path / "both" / name, "base")
    put(hub, "me/both", tmp_path / "both")
    with pytest.raises(UserError) as caught:
        read_any_adapter("hf://me/both", model)
    assert "expected one, hf://me/both/law or hf://me/both/math" in as_given(caught.value)
    assert_equal(
        read_any_adapter("hf://me/both/law", model)[0], read_any_adapter(tmp_path / "both" / "law", model)[0]
    )


@pytest.mark.thorough
def test_a_method_without_a_portable_form_is_pushed_as_a_checkpoint(hub, model, tmp_path):
    run_of(tmp_path / "run", model, "bitfit")
    push(tmp_path / "run", "hf://me/bits")
    assert {name.split("/")[0] for name in hub.files("me/bits")} == {"README.md", "7"}
    assert_equal(load_adapter("hf://me/bits"), load_adapter(tmp_path / "run"))


def test_training_starts_from_an_adapter_of_the_hub(hub, exported, run, model):
    put(hub, "me/math", exported)
    adapter = load_adapter(run)
    found = starting_params("hf://me/math", adapter.method, adapter_shape(TINY), model)
    jax.tree.map(np.testing.assert_array_equal, found, adapter.params)


REFUSED = {
    "no repository": (
        "hf://me/none",
        "there is no such repository, or no right to see it; log in with 'hf auth",
    ),
    "no revision": ("hf://me/math@v9", "its repository has no such revision"),
    "gated": ("hf://me/gated", "its repository is gated; accept its terms on the Hub, and log in with"),
    "private": ("hf://me/private", "there is no such repository, or no right to see it"),
    "no adapter": ("hf://me/base", "'hf://me/base' holds no complete adapter"),
    "no folder": ("hf://me/math/law", "'hf://me/math/law' holds no complete adapter"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_hub_does_not_give_is_one_line(case, hub, exported, monkeypatch):
    address, message = REFUSED[case]
    monkeypatch.delenv("HF_TOKEN")
    for name in ("me/math", "me/gated", "me/private"):
        put(hub, name, exported)
    put(hub, "me/base", model__safetensors="x", config__json="{}")
    hub.gated, hub.private = {"me/gated"}, {"me/private"}
    with pytest.raises(UserError) as caught:
        read_adapter(address)
    line = str(caught.value)
    assert message in as_given(line)
    assert ("\n" in line, caught.value.exit_code) == (False, 2)


@pytest.mark.thorough
@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_is_ill_or_away_is_asked_again_later(status, hub, exported, run, monkeypatch):
    put(hub, "me/math", exported)
    hub.status = status
    for _ in range(2):
        for call in (lambda: load_adapter("hf://me/math"), lambda: push(run, "hf://me/new")):
            with pytest.raises(TemporaryError, match="the Hub is out of reach; ") as caught:
                call()
            assert ("\n" in str(caught.value), caught.value.exit_code) == (False, 75)
        for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):  # where nobody listens
            monkeypatch.setattr(
                constants, name, re.sub(r"127.0.0.1:\d+", "127.0.0.1:9", getattr(constants, name))
            )
    assert "me/new" not in hub.repositories
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for call in (lambda: load_adapter("hf://me/math"), lambda: push(run, "hf://me/new")):
        with pytest.raises(UserError, match="HF_HUB_OFFLINE is set") as caught:
            call()
        assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "address", ["hf://", "hf://math", "hf:/me/math", "hf:me/math", "hf:///math", "hf://me/", "hf://me/math@"]
)
def test_what_is_no_address_is_refused(address, hub):
    with pytest.raises(UserError, match="expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION"):
        load_adapter(address)
    for bad in ("hf://me/../math", "hf://me/math/../x"):
        with pytest.raises(UserError, match="expected hf://OWNER/NAME"):
            on_hub(bad)


def test_what_cannot_be_pushed_makes_no_repository(hub, run, exported, lora, model, tmp_path, monkeypatch):
    shutil.copytree(exported, tmp_path / "damaged")
    flip(tmp_path / "damaged" / "experts.safetensors")
    merged = [
        "export",
        "--workdir",
        lora,
        "--out",
        tmp_path / "merged",
        "--format",
        "merged",
        "--base",
        model,
    ]
    storage.main(list(map(str, merged)))
    for arguments, message in (
        ((tmp_path / "damaged", "hf://me/new"), "cannot be pushed: experts.safetensors"),
        ((tmp_path / "merged", "hf://me/new"), "is a whole model: expected an adapter"),
        ((tmp_path, "hf://me/new"), "holds no complete adapter"),
        ((run, "runs/new"), "'runs/new': expected hf://OWNER/NAME to push to"),
        ((run, "hf://me/new@v1"), "'hf://me/new@v1': expected hf://OWNER/NAME to push to"),
        ((run, "hf://me/new", "--base-name", "/home/me/llama"), "--base-name '/home/me/llama': expected"),
        ((run, "hf://me/new", "--run", lora), f"--run '{lora}': its adapter is not that of the adapter"),
    ):
        with pytest.raises(UserError) as caught:
            push(*arguments)
        assert message in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="no right to do that; log in with 'hf auth login', or set HF_TOKEN"):
        push(run, "hf://me/new")
    assert hub.repositories == {}


def test_a_card_says_what_the_run_did_and_no_path_of_the_machine(hub, run, model, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    data = DataSection(train=f"sums={tmp_path}/train.jsonl,hf:owner/rows:main", test=f"{tmp_path}/told.jsonl")
    own = EvalSection(metric=f"{tmp_path}/mine.py:overlap")
    config = Config(model=ModelSection(path="hf://meta-llama/Llama-3.2-1B@main"), data=data, eval=own)
    (tmp_path / "run" / "config.json").write_bytes(json_bytes(config.to_dict()))
    (tmp_path / "run" / "summary.json").write_bytes(json_bytes(SUMMARY))
    push(tmp_path / "run", "hf://me/math")
    card = hub.files("me/math")["README.md"].decode()
    head = card.split("---\n")[1]
    assert head.splitlines() == [
        'base_model: "meta-llama/Llama-3.2-1B"',
        "base_model_relation: adapter",
        "library_name: milora_jax",
        "pipeline_tag: text-generation",
        *("tags:", "- milora", "- milora_jax", "- adapter"),
        *("datasets:", '- "owner/rows"'),
    ]
    assert "license" not in head
    lines = card.splitlines()
    for line in (
        "# math",
        "| sums | accuracy | 25.0 % | 75.0 % |",
        "| sums | loss | 3.000 | - |",
        "| sums | overlap | 1 | 2.5 |",
        "Dev perplexity 2.500, at step 30.",
        "| training data | sums, owner/rows |",
        "| test data | told |",
        "| tunable parameters | 1234 |",
        "| rank | 4 |",
        'adapter = milora_jax.load_adapter("hf://me/math")',
        "python serve.py --base hf://meta-llama/Llama-3.2-1B --adapter mine=hf://me/math",
    ):
        assert line in lines, card
    assert str(tmp_path) not in card


def test_a_card_without_a_run_says_how_to_load_the_adapter():
    card = Card("hf://me/math", "peft", "", {}, None, {}).text()
    assert "base_model" not in card
    assert 'from_pretrained("BASE")' in card
    assert "## Results" not in card
    assert "## Training" not in card
