"""Directories that PEFT saved are served as they are, or refused by name; nothing is written into them."""

import json
import re

import numpy as np
import pytest

from milora_jax.commands import generation
from milora_jax.errors import UserError
from milora_jax.serving.store import version_of
from milora_jax.storage.adapters import read_adapter
from milora_jax.storage.export import export_peft
from milora_jax.storage.imported import import_peft, read_any_adapter
from tests.models import WITH_TOKENIZER, write_hf_directory
from tests.serving.test_store import Now
from tests.storage.adapters import run_of

pytest.importorskip("transformers", reason="a server has a tokenizer, which the core does without")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, runs of LoRA, DoRA and MiLoRA, and PEFT directories: ours, sealed, and a stranger's."""
    folder = tmp_path_factory.mktemp("peft")
    write_hf_directory(folder / "model", WITH_TOKENIZER)
    for name, method, settings in (
        ("lora", "lora", {"rank": 4}),
        ("wide", "lora", {"rank": 12}),
        ("dora", "dora", {"rank": 4}),
        ("milora", "milora", {}),
    ):
        run_of(folder / name, folder / "model", method, **settings)
        if name != "milora":
            export_peft(folder / name, folder / f"sealed-{name}", "base")
            export_peft(folder / name, folder / f"peft-{name}", "base")
            for own in ("export.json", "manifest.json"):
                (folder / f"peft-{name}" / own).unlink()
    return folder


def store_of(folder, *names):
    from milora_jax.base.load import load_base
    from milora_jax.base.modules import decode_layout
    from milora_jax.serving.store import AdapterStore, Model

    base, config = load_base(folder / "model")
    model = Model(decode_layout(base), config, folder / "model", "none")
    return AdapterStore(model, {name: folder / name for name in names}, 6, Now())


def contents(directory):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.iterdir()}


@pytest.mark.thorough
def test_they_share_a_bank_with_our_adapters_and_are_what_import_makes(folder, tmp_path):
    before = contents(folder / "peft-lora")
    store = store_of(folder, "peft-lora", "wide")
    for name in ("sealed-lora", "peft-wide", "lora"):
        store.load(name, folder / name)
    import_peft(folder / "peft-lora", folder / "model", tmp_path / "imported")
    versions = {each.name: each.version for each in store.versions()}
    assert versions["peft-lora"] == version_of(read_adapter(tmp_path / "imported")[0])
    assert contents(folder / "peft-lora") == before
    assert store.has_base


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("first", "other", "message"),
    [
        ("peft-lora", "peft-dora", "adapter 'peft-dora' is of method 'dora': this bank holds 'lora'"),
        ("milora", "peft-lora", "adapter 'peft-lora' is of method 'lora': this bank holds 'milora'"),
        ("peft-lora", "peft-wide", "has pairs of rank 12: expected at most 8; .*--max-lora-rank 12"),
    ],
)
def test_what_does_not_fit_the_bank_is_refused_by_name(folder, first, other, message):
    store = store_of(folder, first)
    with pytest.raises(UserError, match=message) as caught:
        store.load(other, folder / other)
    assert "\n" not in str(caught.value)
    assert store.names() == [first]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank_pattern": {"q_proj": 2}}, "q_proj.lora_A.weight' has shape [4, 32], expected [2, 32]"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is [[0, 1]], expected unset: not supported"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', expected 'LORA'"),
        ({"target_modules": ["lm_head"]}, "target_modules names 'lm_head'"),
        ({"r": 5}, "lora_A.weight"),
    ],
)
def test_what_cannot_be_mapped_is_refused_by_name_at_load_time(folder, tmp_path, change, message):
    for path in (folder / "peft-lora").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    store = store_of(folder, "lora")
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        store.load("law", tmp_path)
    assert "\n" not in str(caught.value)


def test_some_modules_alone_are_an_adapter_too(folder, tmp_path):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "peft-lora" / "adapter_model.safetensors")
    kept = {name: value for name, value in tensors.items() if "q_proj" in name or "v_proj" in name}
    config = json.loads((folder / "peft-lora" / "adapter_config.json").read_text())
    save_file(kept, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**config, "target_modules": ["q_proj", "v_proj"]})
    )
    adapter, metadata = read_any_adapter(tmp_path, folder / "model", "int8")
    assert adapter.method.target_modules == "q_proj,v_proj"
    assert adapter.params.keys() == {"q", "v"}
    assert metadata["quantize"] == "int8"
    store_of(folder, "lora").load("part", tmp_path)


def test_patterns_of_ranks_and_scales_are_served_as_they_mean(folder, tmp_path):
    """A pair cut to a smaller rank, with the alpha that keeps its scale, is the pair with zeros."""
    from safetensors.numpy import load_file, save_file

    source = folder / "peft-lora"
    tensors, cut = load_file(source / "adapter_model.safetensors"), {}
    for name, value in tensors.items():
        if "q_proj" in name:
            value = np.ascontiguousarray(value[:1] if "lora_A" in name else value[:, :1])
        cut[name.replace("lora_A.", "lora_A.law.").replace("lora_B.", "lora_B.law.")] = value
    save_file(cut, tmp_path / "adapter_model.safetensors")
    config = json.loads((source / "adapter_config.json").read_text())
    patterns = {
        "rank_pattern": {"q_proj": 1},
        "alpha_pattern": {"q_proj": config["lora_alpha"] / config["r"]},
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **patterns}))
    store = store_of(folder, "peft-lora")
    store.load("law", tmp_path)
    found, whole = (read_any_adapter(path, folder / "model")[0] for path in (tmp_path, source))
    assert found.method == whole.method
    for module, pair in whole.params.items():
        kept = 1 if module == "q" else None
        np.testing.assert_array_equal(found.params[module].a[..., :kept], pair.a[..., :kept])
        np.testing.assert_array_equal(found.params[module].b[:, :kept], pair.b[:, :kept])
    assert not found.params["q"].a[..., 1:].any()


@pytest.mark.thorough
def test_the_generation_command_takes_one(folder, capsys):
    given = ["--base", str(folder / "model"), "--prompt", "the", "--max-new-tokens", "4", "--json"]
    said = []
    for name in ("lora", "peft-lora", "sealed-lora"):
        generation.main([*given, "--adapter", str(folder / name)])
        said.append(json.loads(capsys.readouterr().out)["samples"])
    assert said[0] == said[1] == said[2]
