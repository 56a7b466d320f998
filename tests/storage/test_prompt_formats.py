"""How prompts are written is kept with an adapter, through every form of it; old ones keep what all had."""

import dataclasses
import json
import logging
import sys

import pytest

from milora_jax.adapters.registry import ROUTERS_BEFORE_FEATURES
from milora_jax.base.load import load_base
from milora_jax.commands.storage import main
from milora_jax.config import Config, DataSection, ModelSection
from milora_jax.errors import UserError
from milora_jax.prompt_format import SPECIAL_TOKENS, UNSTORED, PromptFormat
from milora_jax.storage.adapters import load_adapter
from milora_jax.storage.checkpoint import CheckpointDirectory, read_metadata
from milora_jax.storage.export import export_milora, export_orbax, export_peft
from milora_jax.storage.files import json_bytes
from milora_jax.storage.imported import import_peft
from milora_jax.storage.manifest import MANIFEST, write_manifest
from milora_jax.storage.workdir import read_workdir_config
from tests.storage.adapters import STEP, noisy_adapter, of_then, run_of, write_run

WRITTEN = PromptFormat("chat", "none", "2026-11-29T12:00:00")


def adapter_of(model, method, written):
    base, config = load_base(model)
    return dataclasses.replace(noisy_adapter(base, config, method), prompt_format=written)


@pytest.mark.thorough
@pytest.mark.parametrize("written", [WRITTEN, PromptFormat()])
def test_it_goes_with_the_adapter(model, tmp_path, written, caplog):
    adapter = adapter_of(model, "lora", written)
    write_run(tmp_path / "run", model, adapter)
    assert load_adapter(tmp_path / "run").prompt_format == written
    export_milora(tmp_path / "run", tmp_path / "portable")
    export_orbax(tmp_path / "portable", tmp_path / "orbax")
    export_peft(tmp_path / "orbax", tmp_path / "peft", "base")
    import_peft(tmp_path / "peft", model, tmp_path / "back")
    for name in ("portable", "orbax", "back"):
        assert load_adapter(tmp_path / name).prompt_format == written
    assert not caplog.records


def test_a_peft_adapter_of_others_follows_its_tokenizer(model, tmp_path):
    write_run(tmp_path / "run", model, adapter_of(model, "lora", WRITTEN))
    export_peft(tmp_path / "run", tmp_path / "peft", "base")
    for name in (MANIFEST, "export.json"):
        (tmp_path / "peft" / name).unlink()
    import_peft(tmp_path / "peft", model, tmp_path / "back")
    assert load_adapter(tmp_path / "back").prompt_format == PromptFormat(template="")


@pytest.mark.thorough
@pytest.mark.parametrize("rule", SPECIAL_TOKENS)
def test_who_exports_for_other_programs_is_told_what_they_do_not_know(
    model, tmp_path, monkeypatch, capsys, rule
):
    write_run(tmp_path / "run", model, adapter_of(model, "lora", PromptFormat(special_tokens=rule)))
    for kind in ("peft", "milora"):
        arguments = ["export", "--workdir", str(tmp_path / "run"), "--out", str(tmp_path / kind)]
        monkeypatch.setattr(sys, "argv", ["storage", *arguments, "--format", kind])
        main()
        told = "note: the adapter was trained with" in capsys.readouterr().err
        assert told == (kind == "peft" and rule != "tokenizer")


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_what_a_run_says_counts_and_a_chat_template_needs_no_note(
    model, tmp_path, monkeypatch, capsys, template
):
    """An older adapter stores neither; a chat template writes its own special tokens."""
    write_run(tmp_path / "run", model, adapter_of(model, "lora", UNSTORED))
    config = Config(
        model=ModelSection(path=str(model)), data=DataSection(template=template, special_tokens="bos")
    )
    (tmp_path / "run/config.json").write_bytes(json_bytes(config.to_dict()))
    arguments = [
        "export",
        "--workdir",
        str(tmp_path / "run"),
        "--out",
        str(tmp_path / "out"),
        "--format",
        "peft",
    ]
    monkeypatch.setattr(sys, "argv", ["storage", *arguments])
    main()
    assert ("note: the adapter was trained with" in capsys.readouterr().err) == (template == "alpaca")


def older_export(directory):
    """Make of an export what a version wrote that did not store the format."""
    path = directory / "milora_config.json"
    values = json.loads(path.read_text())
    del values["prompt_format"]
    path.write_bytes(json_bytes({**values, "format": 1, "adapter": of_then(values["adapter"], True)}))
    (directory / MANIFEST).unlink()
    write_manifest(directory)


def test_an_older_adapter_keeps_the_rule_that_all_had(model, tmp_path, caplog):
    settings = {**ROUTERS_BEFORE_FEATURES, "features": "rms"}
    adapter = run_of(tmp_path / "now", model, "milora", **settings)
    export_milora(tmp_path / "now", tmp_path / "old")
    older_export(tmp_path / "old")
    directory = CheckpointDirectory(tmp_path / "run" / "best", 1, print)
    metadata = read_metadata(tmp_path / "now" / "best", STEP)
    directory.save(STEP, adapter.params, {k: v for k, v in metadata.items() if k != "prompt_format"})
    directory.wait()
    for name in ("old", "run"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = load_adapter(tmp_path / name)
        assert found.prompt_format == UNSTORED
        assert (found.prompt_format.special_tokens, found.prompt_format.template) == ("bos", "")
        (record,) = caplog.records
        assert "they begin with one beginning-of-sequence token" in record.getMessage()


def test_an_older_workdir_keeps_it_too(tmp_path):
    values = Config(model=ModelSection(path="x")).to_dict()
    for name in ("special_tokens", "template_time"):
        del values["data"][name]
    (tmp_path / "config.json").write_bytes(json_bytes(values))
    assert read_workdir_config(tmp_path).data.prompt_format == PromptFormat("alpaca", "bos")


@pytest.mark.parametrize(
    "wrong", [None, {}, {"template": "alpaca"}, {"template": "x", "special_tokens": "bos", "time": ""}]
)
def test_a_format_that_is_none_is_refused(exported, tmp_path, wrong):
    import shutil

    shutil.copytree(exported, tmp_path / "bad")
    path = tmp_path / "bad" / "milora_config.json"
    path.write_bytes(json_bytes({**json.loads(path.read_text()), "prompt_format": wrong}))
    (tmp_path / "bad" / MANIFEST).unlink()
    write_manifest(tmp_path / "bad")
    with pytest.raises(UserError, match=r"milora_config\.json: (prompt_format|data\.template) is"):
        load_adapter(tmp_path / "bad")
