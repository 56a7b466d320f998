"""Merged weights are W + s B A to the rounding, in the files of the base and nowhere else."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.base.load import load_base
from milora_jax.base.specs import MODULE_PATHS
from milora_jax.errors import UserError
from milora_jax.storage.adapter_tensors import read_tensors, write_tensors
from milora_jax.storage.adapters import load_adapter
from milora_jax.storage.export import export_merged
from milora_jax.storage.merged import SHARD_BYTES
from milora_jax.storage.verify import findings
from milora_jax.types import EXPERTS
from tests.families import FAMILY_CONFIGS
from tests.models import TINY, write_hf_directory
from tests.storage.adapters import hidden, run_of

TIED = dataclasses.replace(TINY, tie_embeddings=True, biased=EXPERTS)


def merge(run, base, out, weights=None, shard_bytes=SHARD_BYTES):
    export_merged(run, base, out, weights, {}, shard_bytes)
    return {
        name: value
        for path in sorted(out.glob("*.safetensors"))
        for name, value in read_tensors(path).items()
    }


def route_weights(seed=0):
    """Three experts a layer, each with a weight of its own."""
    rng = np.random.default_rng(seed)
    weights = np.zeros((TINY.num_layers, len(EXPERTS)), np.float32)
    for row in weights:
        row[rng.choice(len(EXPERTS), 3, replace=False)] = rng.uniform(0.5, 2.0, 3)
    return weights


def exact(adapter, layer, module, weight, share):
    """The merged weight by the formula, in float64."""
    params = adapter.params.experts if hasattr(adapter.params, "experts") else adapter.params
    record = params[module]
    a, b, w = (np.asarray(x, np.float64) for x in (record.a[layer], record.b[layer], weight))
    if hasattr(record, "singular"):
        b = np.asarray(record.singular[layer], np.float64)[:, None] * b
    change = adapter.method.scale * (b.T @ a.T)
    if hasattr(record, "magnitude"):
        whole = w + change
        change = (np.asarray(record.magnitude[layer]) / np.linalg.norm(whole, axis=1))[:, None] * whole - w
    return w + share * change


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", {"alpha": 8.0}),
        ("adalora", {"alpha": 2.0}),
        ("dora", {"alpha": 6.0, "use_rslora": True}),
        ("milora", {}),
        ("midora", {"alpha": 3.0}),
    ],
)
def test_merged_weights_equal_the_formula_and_all_else_is_copied(method, settings, model, tmp_path):
    adapter = run_of(tmp_path / "run", model, method, **settings)
    weights = route_weights() if adapter.method.routes else None
    merged = merge(tmp_path / "run", model, tmp_path / "out", weights)
    before = read_tensors(model / "model.safetensors")
    assert merged.keys() == before.keys()
    touched = 0
    for layer in range(TINY.num_layers):
        for i, module in enumerate(EXPERTS):
            name = f"model.layers.{layer}.{MODULE_PATHS[module]}.weight"
            share = 1.0 if weights is None else weights[layer, i]
            found, expected = merged.pop(name), exact(adapter, layer, module, before[name], share)
            assert np.abs(found - expected).max() <= 4e-7 * max(np.abs(expected).max(), 1)
            touched += not np.array_equal(found, before[name])
    assert touched == (TINY.num_layers * (7 if weights is None else 3))
    for name, value in merged.items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    assert (tmp_path / "out" / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert findings(tmp_path / "out", model) == {tmp_path / "out": []}


@pytest.mark.thorough
def test_a_merged_base_computes_what_the_adapter_does_on_its_route(model, tmp_path):
    adapter = run_of(tmp_path / "run", model, "milora")
    weights = route_weights()
    merge(tmp_path / "run", model, tmp_path / "out", weights)
    routed = hidden(model, adapter, weights)
    np.testing.assert_allclose(hidden(tmp_path / "out"), routed, atol=1e-4)
    assert np.abs(hidden(model) - routed).max() > 0.1


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["phi3", "gemma3_text", "mixtral", "qwen3_moe"])
def test_a_base_of_another_family_is_merged(name, tmp_path):
    """Modules in one tensor change each in its place; the text of a model with images has longer names; every
    expert of a base gets the change of the pair that all share."""
    base, out = tmp_path / "base", tmp_path / "out"
    write_hf_directory(base, FAMILY_CONFIGS[name], tokenizer=False)
    adapter = run_of(tmp_path / "run", base, "lora", alpha=8.0)
    before = hidden(base, adapter)
    if name == "gemma3_text":
        path = base / "model.safetensors"
        tensors = {f"language_model.{name}": value for name, value in read_tensors(path).items()}
        path.unlink()
        write_tensors(path, tensors)
    assert merge(tmp_path / "run", base, out).keys() == read_tensors(base / "model.safetensors").keys()
    np.testing.assert_allclose(hidden(out), before, rtol=1e-4, atol=1e-4)


def test_a_base_in_which_a_change_would_be_lost_is_refused(model, tmp_path):
    run_of(tmp_path / "run", model, "lora")
    base = tmp_path / "base"
    shutil.copytree(model, base)
    tensors = dict(read_tensors(model / "model.safetensors"))
    tensors["model.layers.1.mlp.c_fc.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    write_tensors(base / "model.safetensors", tensors)
    with pytest.raises(UserError, match="no weight of module 'up' of layer 1 to merge into"):
        merge(tmp_path / "run", base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_shards_hold_every_tensor_once_in_the_dtype_of_the_base(dtype, tmp_path):
    base, plain, sharded = tmp_path / "base", tmp_path / "plain", tmp_path / "sharded"
    write_hf_directory(base, TIED, dtype=dtype, tokenizer=False)
    run_of(tmp_path / "run", base, "lora")
    whole = merge(tmp_path / "run", base, plain)
    parts = merge(tmp_path / "run", base, sharded, shard_bytes=10_000)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    names = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert names == [f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]
    assert len(names) > 2
    assert index["weight_map"].keys() == whole.keys() == parts.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    for name, value in whole.items():
        assert value.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(parts[name], value)
    jax.tree.map(np.testing.assert_array_equal, load_base(sharded)[0], load_base(plain)[0])
    again = merge(tmp_path / "run", sharded, tmp_path / "again", shard_bytes=10_000)
    assert again.keys() == whole.keys(), "a base in shards is read as well"


def test_what_cannot_be_merged_is_refused_and_nothing_is_left(model, tmp_path):
    run_of(tmp_path / "routed", model, "milora")
    run_of(tmp_path / "ia3", model, "ia3")
    small = tmp_path / "small"
    write_hf_directory(small, TINY, dtype="float16", tokenizer=False)
    huge = run_of(tmp_path / "huge", small, "lora", alpha=4e6)
    assert huge.method.scale == 1e6
    cases = {
        "routed": (
            model,
            "method 'milora' routes every prompt: a fixed route needs --calibration FILE",
        ),
        "ia3": (model, "method 'ia3' is more than one change of each weight"),
        "huge": (small, "merged tensor .* has values that are not finite in float16"),
    }
    for name, (base, message) in cases.items():
        with pytest.raises(UserError, match=message):
            merge(tmp_path / name, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.tmp").exists()


def test_files_that_would_change_the_merged_model_are_left_behind(model, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(model, base)
    for name in (
        "adapter_config.json",
        "modeling.py",
        "tokenizer_code.py",
        "generation_config.json",
        "notes.txt",
    ):
        (base / name).write_text("{}")
    run_of(tmp_path / "run", base, "lora")
    merge(tmp_path / "run", base, tmp_path / "out")
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    expected = ["config.json", "export.json", "generation_config.json", "manifest.json", "model.safetensors"]
    assert found == [*expected, "notes.txt"]
    assert load_adapter(tmp_path / "run").method.name == "lora"
