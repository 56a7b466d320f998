"""Adapters, exports and runs from before ``adapter.features`` was a setting keep the router they had."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from milora_jax.adapters.registry import ROUTERS_BEFORE_FEATURES, build_method, full_settings
from milora_jax.base.load import load_base
from milora_jax.config import AdapterSection, Config, TrainSection
from milora_jax.errors import UserError
from milora_jax.generation.bank import Bank
from milora_jax.storage.adapters import adapter_metadata, load_adapter
from milora_jax.storage.checkpoint import CheckpointDirectory
from milora_jax.storage.export import export_milora
from milora_jax.storage.files import json_bytes
from milora_jax.storage.manifest import write_manifest
from milora_jax.storage.torch_reference import full_values
from milora_jax.storage.workdir import read_workdir_config
from milora_jax.training.workdir import continued
from tests.models import write_hf_directory
from tests.storage.adapters import STEP, noisy_adapter, of_then, run_of

pytest.importorskip("transformers", reason="a model's directory has a tokenizer, which the core does without")

MEANS = {True: "rms", False: "raw"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_hf_directory(folder)
    return folder


@pytest.mark.parametrize("normalize", [True, False])
def test_an_old_run_and_its_old_export_load_with_their_router(model, normalize, tmp_path):
    settings = {**ROUTERS_BEFORE_FEATURES, "features": MEANS[normalize]}
    adapter = run_of(tmp_path / "run", model, "milora", **settings)
    export_milora(tmp_path / "run", tmp_path / "export")
    path = tmp_path / "export" / "milora_config.json"
    values = json.loads(path.read_text())
    old = {**values, "format": 2, "adapter": of_then(values["adapter"], normalize)}
    path.write_bytes(json_bytes(old))
    write_manifest(tmp_path / "export")
    directory = CheckpointDirectory(tmp_path / "old" / "best", 1, print)
    metadata = adapter_metadata(adapter.method, adapter.shape, "base", "none", adapter.prompt_format)
    directory.save(STEP, adapter.params, {**metadata, "adapter": of_then(metadata["adapter"], normalize)})
    directory.wait()
    for place in ("export", "old"):
        found = load_adapter(tmp_path / place)
        assert found.method == adapter.method
        assert found.method.features == MEANS[normalize]
        jax.tree.map(np.testing.assert_array_equal, found.params, adapter.params)
    assert full_values(old["adapter"])["features"] == MEANS[normalize]


@pytest.mark.parametrize(
    ("form", "change"), [(2, {}), (3, {"features": None, "normalize": True}), (3, {"features": None})]
)
def test_settings_of_another_format_are_refused(model, form, change, tmp_path):
    run_of(tmp_path / "run", model, "milora")
    export_milora(tmp_path / "run", tmp_path / "export")
    path = tmp_path / "export" / "milora_config.json"
    values = json.loads(path.read_text())
    path.write_bytes(json_bytes({**values, "format": form, "adapter": {**values["adapter"], **change}}))
    write_manifest(tmp_path / "export")
    with pytest.raises(UserError, match="settings of method 'milora' are not"):
        load_adapter(tmp_path / "export")


def test_adapters_from_before_route_on_read_the_whole_prompt(model, tmp_path):
    adapter = run_of(tmp_path / "run", model, "milora")
    export_milora(tmp_path / "run", tmp_path / "export")
    path = tmp_path / "export" / "milora_config.json"
    values = json.loads(path.read_text())
    assert (values["format"], values["adapter"].pop("route_on")) == (4, "prompt")
    path.write_bytes(json_bytes({**values, "format": 3}))
    write_manifest(tmp_path / "export")
    metadata = adapter_metadata(adapter.method, adapter.shape, "base", "none", adapter.prompt_format)
    del metadata["adapter"]["route_on"]
    directory = CheckpointDirectory(tmp_path / "old" / "best", 1, print)
    directory.save(STEP, adapter.params, metadata)
    directory.wait()
    for place in ("export", "old"):
        assert load_adapter(tmp_path / place).method == adapter.method
    assert full_values(values["adapter"])["route_on"] == "prompt"


@pytest.mark.parametrize("part", ["prompt", "first_turn"])
def test_an_export_keeps_what_the_routers_read(model, part, tmp_path):
    adapter = run_of(tmp_path / "run", model, "milora", route_on=part)
    export_milora(tmp_path / "run", tmp_path / "export")
    found = load_adapter(tmp_path / "export")
    assert found.method == adapter.method
    assert found.encoding.route_on == part
    assert found.prompt_format == adapter.prompt_format


def test_an_old_run_goes_on_with_its_router_whatever_the_defaults_are(tmp_path):
    written = Config(adapter=full_settings(build_method(AdapterSection(rank=4)))).to_dict()
    written["adapter"] = of_then(written["adapter"], True)
    (tmp_path / "config.json").write_bytes(json_bytes(written))
    kept = read_workdir_config(tmp_path).adapter
    assert kept.features == "rms"
    assert {name: getattr(kept, name) for name in ROUTERS_BEFORE_FEATURES} == ROUTERS_BEFORE_FEATURES
    given = Config(adapter=AdapterSection(rank=4), train=TrainSection(max_steps=3))
    assert continued(given, tmp_path, print).adapter == kept
    asked = dataclasses.replace(given, adapter=AdapterSection(rank=4, features="raw"))
    assert continued(asked, tmp_path, print).adapter.features == "raw", "what is asked for is never dropped"


def test_the_former_name_is_read_and_must_agree():
    assert AdapterSection(normalize=False).features == "raw"
    assert AdapterSection(normalize=True, features="rms").features == "rms"
    with pytest.raises(
        UserError, match=r"adapter\.features is 'standardized': expected rms, which adapter\.nor"
    ):
        AdapterSection(normalize=True, features="standardized")
    with pytest.raises(UserError, match="has no such setting"):
        build_method(AdapterSection(method="lora", normalize=True))


def test_a_bank_names_the_routers_it_cannot_hold_together(model):
    base, config = load_base(model)
    bank = Bank(base, config, noisy_adapter(base, config, features="standardized"), 2)
    trained_otherwise = noisy_adapter(
        base, config, features="standardized", router_gradient="dense", top_k_anneal=0.4, load_balance=0.5
    )
    bank.load("other training", trained_otherwise)
    for settings, said in (
        ({"features": "rms"}, "features"),
        ({"features": "standardized", "balance": "bias"}, "balance"),
    ):
        with pytest.raises(UserError, match=said):
            bank.load("other router", noisy_adapter(base, config, **settings))
