"""Directories in all the forms that PEFT and its readers write, by hand and without torch: what they mean."""

import json
import shutil

import numpy as np
import pytest

from milora_jax.base.load import load_base
from milora_jax.base.modules import frozen_kernels
from milora_jax.base.specs import MODULE_PATHS
from milora_jax.errors import UserError
from milora_jax.storage.adapter_tensors import read_tensors, write_tensors
from milora_jax.storage.adapters import load_adapter, read_adapter
from milora_jax.storage.imported import import_peft, read_any_adapter
from milora_jax.storage.peft_settings import PEFT_CONFIG, PEFT_TENSORS, read_peft_settings
from milora_jax.storage.verify import findings
from milora_jax.types import EXPERTS
from tests.models import TINY

pytest.importorskip("regex", reason="needs the package regex, which transformers brings")

DIMS = TINY.module_dims
Q, V, DOWN = "self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"
EVERY = [(layer, path) for layer in range(TINY.num_layers) for path in MODULE_PATHS.values()]
OURS = {path: module for module, path in MODULE_PATHS.items()}


def write(folder, ranks, name="base_model.model.model.layers.{}.{}.{}.weight", **config):
    """A LoRA with a pair of a rank at each (layer, path); gives its pairs ``[r, in]`` and ``[out, r]``."""
    rng, tensors, pairs = np.random.default_rng(0), {}, {}
    for (layer, path), rank in ranks.items():
        d_in, d_out = DIMS[OURS[path]]
        a, b = (rng.normal(size=size).astype(np.float32) for size in ((rank, d_in), (d_out, rank)))
        pairs[layer, path] = a, b
        tensors[name.format(layer, path, "lora_A")] = a
        tensors[name.format(layer, path, "lora_B")] = b
        if config.get("use_dora"):
            magnitude = name.format(layer, path, "lora_magnitude_vector").removesuffix(".weight")
            tensors[magnitude] = rng.uniform(1, 2, d_out).astype(np.float32)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PEFT_CONFIG).write_text(json.dumps(settings))
    write_tensors(folder / PEFT_TENSORS, tensors)
    return pairs


def changes(adapter):
    """The change of every weight ``[out, in]`` by (layer, path)."""
    scale = adapter.method.scale
    return {
        (layer, path): scale * (np.asarray(pair.a[layer]) @ np.asarray(pair.b[layer])).T
        for path, module in OURS.items()
        if module in adapter.params
        for layer in range(TINY.num_layers)
        for pair in (adapter.params[module],)
    }


def assert_means(folder, model, pairs, scales):
    """The adapter of a folder changes each weight by its own scale times its pair, and no other weight."""
    assert findings(folder, model) == {folder: []}
    assert findings(folder, None) == {folder: []}
    adapter = read_any_adapter(folder, model)[0]
    assert adapter.method.modules == tuple(m for m in EXPERTS if m in {OURS[path] for _, path in pairs})
    assert adapter.params.keys() == set(adapter.method.modules)
    for place, change in changes(adapter).items():
        expected = np.zeros_like(change)
        if place in pairs:
            a, b = pairs[place]
            expected = scales[place] * (b @ a)
        np.testing.assert_allclose(change, expected, rtol=0, atol=2e-5 * max(1.0, np.abs(expected).max()))
    return adapter


def test_ranks_and_scales_by_patterns(model, tmp_path):
    ranks = {place: 4 for place in EVERY} | {(0, Q): 2, (1, Q): 2, (1, DOWN): 6}
    patterns = {
        "rank_pattern": {"q_proj": 2, r"layers\.1\..*down_proj": 6},
        "alpha_pattern": {"v_proj": 3, "^model.layers.0.mlp.up_proj": 20},
    }
    given = tmp_path / "given"
    pairs = write(given, ranks, target_modules=["q_proj", *MODULE_PATHS.values()], **patterns)
    alphas = {place: 8 for place in EVERY} | {(0, V): 3, (1, V): 3, (0, "mlp.up_proj"): 20}
    scales = {place: alphas[place] / ranks[place] for place in EVERY}
    adapter = assert_means(given, model, pairs, scales)
    assert (adapter.method.rank, adapter.method.alpha) == (6, 30.0)
    assert not np.any(adapter.params["q"].a[:, :, 2:]), "padding stays as it is, in training too"
    assert not np.any(adapter.params["q"].b[:, 2:])
    assert import_peft(given, model, tmp_path / "out") == [
        "pairs of rank 2 to 6: all are padded to 6, which changes nothing",
        "scales from 0.75 to 5: their ratios are multiplied into lora_B",
    ]
    stabilised = tmp_path / "stabilised"
    pairs = write(stabilised, ranks, target_modules=list(OURS), use_rslora=True, **patterns)
    assert_means(stabilised, model, pairs, {place: alphas[place] / ranks[place] ** 0.5 for place in EVERY})


def test_the_first_pattern_in_the_file_counts(model, tmp_path):
    ranks = {(layer, Q): 3 for layer in range(2)}
    order = {"rank_pattern": {".*": 3, "q_proj": 2}, "target_modules": ["q_proj"]}
    assert_means(tmp_path, model, write(tmp_path, ranks, **order), {place: 8 / 3 for place in ranks})


CHOSEN = {
    "names": ({"target_modules": ["q_proj", "mlp.down_proj"]}, {(0, Q), (1, Q), (0, DOWN), (1, DOWN)}),
    "full names": (
        {"target_modules": ["model.layers.1.self_attn.q_proj", "layers.0.mlp.down_proj"]},
        {
            (1, Q),
            (0, DOWN),
        },
    ),
    "expression": ({"target_modules": r".*\.(q|v)_proj"}, {(0, Q), (1, Q), (0, V), (1, V)}),
    "all": ({"target_modules": "All-Linear"}, set(EVERY)),
    "all but": (
        {"target_modules": "all-linear", "exclude_modules": ["q_proj", "layers.0.mlp.down_proj"]},
        set(EVERY) - {(0, Q), (1, Q), (0, DOWN)},
    ),
    "but an expression": (
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*"},
        {(1, Q), (1, V)},
    ),
    "a layer": ({"target_modules": ["q_proj"], "layers_to_transform": 1}, {(1, Q)}),
    "layers": ({"target_modules": ["q_proj"], "layers_to_transform": [0, 7]}, {(0, Q)}),
    "layers of a list": (
        {"target_modules": ["v_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
        {(1, V)},
    ),
    "a full name in no layer": (
        {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"], "layers_to_transform": [1]},
        {(0, Q), (1, V)},
    ),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_the_modules_that_peft_chooses_have_the_pairs(name, model, tmp_path):
    config, places = CHOSEN[name]
    pairs = write(tmp_path, {place: 4 for place in sorted(places)}, **config)
    assert_means(tmp_path, model, pairs, {place: 2.0 for place in places})


def test_layers_without_a_pair_are_told_and_can_be_trained(model, tmp_path):
    write(tmp_path / "in", {(1, Q): 4}, target_modules=["q_proj"], layers_to_transform=[1])
    said = import_peft(tmp_path / "in", model, tmp_path / "out")
    assert said == ["no pairs for q in 1 of 2 layers: theirs are fresh and change nothing"]
    adapter = load_adapter(tmp_path / "out")
    assert adapter.method.target_modules == "q_proj"
    a, b = np.asarray(adapter.params["q"].a), np.asarray(adapter.params["q"].b)
    assert a.any(axis=(1, 2)).all(), "a pair of zeros could never be trained"
    assert b.any(axis=(1, 2)).tolist() == [False, True]
    said = import_peft(tmp_path / "in", model, tmp_path / "experts", "milora")
    assert said[0] == (
        "no pairs for k, v, o, gate, up, down, q in 1 of 2 layers: theirs are fresh and change nothing"
    )
    experts = load_adapter(tmp_path / "experts").params.experts
    for module in EXPERTS:
        assert np.asarray(experts[module].a).any(axis=(1, 2)).all()


def test_magnitudes_of_fresh_pairs_are_those_of_the_base(model, tmp_path):
    """Where a module has pairs in some layers, and for the experts that it does not name."""
    given, kernels = tmp_path / "in", frozen_kernels(load_base(model)[0])
    up = "mlp.up_proj"
    places = {(0, Q): 4, (1, Q): 2, (0, up): 4}
    targets = ["q_proj", "layers.0.mlp.up_proj"]
    write(given, places, target_modules=targets, use_dora=True, rank_pattern={"layers.1.*": 2})
    adapter = read_any_adapter(given, model)[0]
    assert (adapter.method.name, adapter.method.modules) == ("dora", ("q", "up"))
    norms = {module: np.linalg.norm(np.asarray(kernel), axis=1) for module, kernel in kernels.items()}
    np.testing.assert_allclose(adapter.params["up"].magnitude[1], norms["up"][1], rtol=1e-6)
    assert not np.any(adapter.params["up"].b[1])
    for fixed in (adapter.params["q"].magnitude, adapter.params["up"].magnitude[:1]):
        assert 1 <= float(fixed.min()) <= float(fixed.max()) <= 2
    import_peft(given, model, tmp_path / "out", "midora")
    experts = load_adapter(tmp_path / "out").params.experts
    for module in set(EXPERTS) - {"q", "up"}:
        np.testing.assert_allclose(experts[module].magnitude, norms[module], rtol=1e-6)
        assert not np.any(experts[module].b)
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    weights = dict(read_tensors(damaged / "model.safetensors"))
    del weights["model.layers.1.mlp.up_proj.weight"]
    (damaged / "model.safetensors").unlink()
    write_tensors(damaged / "model.safetensors", weights)
    with pytest.raises(UserError, match=r"no tensor 'model.layers.1.mlp.up_proj.weight' of shape \[48, 32\]"):
        read_any_adapter(given, damaged)
    with pytest.raises(UserError, match=r"no pairs for up in 1 of 2 layers: .* kept as 'int8', whose"):
        read_any_adapter(given, model, "int8")
    whole = tmp_path / "whole"
    write(whole, {(0, Q): 4, (1, Q): 4}, target_modules=["q_proj"], use_dora=True)
    assert read_any_adapter(whole, model, "int8")[1]["quantize"] == "int8"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("base_model.model.model.layers.{}.{}.{}.default.weight", []),
        ("base_model.model.model.layers.{}.{}.{}.law-2.weight", []),
        ("base_model.model.model.language_model.layers.{}.{}.{}.weight", ["model.language_model"]),
        ("base_model.model.language_model.model.layers.{}.{}.{}.weight", ["language_model.model"]),
        ("base_model.model.model.text_model.layers.{}.{}.{}.default.weight", ["model.text_model"]),
    ],
)
def test_tensors_under_other_names(name, said, model, tmp_path):
    pairs = write(tmp_path / "in", {(0, Q): 4, (1, Q): 4}, name, target_modules=r".*\.q_proj")
    assert_means(tmp_path / "in", model, pairs, {place: 2.0 for place in pairs})
    found = import_peft(tmp_path / "in", model, tmp_path / "out")
    expected = [f"trained within another model, as its {prefix!r}: taken to be this base" for prefix in said]
    assert found == expected


def test_names_of_layers_are_those_of_the_model_it_was_trained_in(model, tmp_path):
    """A full name counts with its prefix, as in PEFT."""
    name = "base_model.model.model.language_model.layers.{}.{}.{}.weight"
    full = "model.language_model.layers.1.self_attn.q_proj"
    pairs = write(tmp_path, {(1, Q): 4}, name, target_modules=[full], alpha_pattern={f"^{full}": 4})
    assert_means(tmp_path, model, pairs, {(1, Q): 1.0})


def with_tensor(folder, name, like=(4, 32)):
    """Add a tensor to a file."""
    tensors = dict(read_tensors(folder / PEFT_TENSORS))
    tensors[name] = np.ones(like, np.float32)
    (folder / PEFT_TENSORS).unlink()
    write_tensors(folder / PEFT_TENSORS, tensors)


P = "base_model.model."
A = f"{P}model.layers.0.self_attn.q_proj.lora_A"
TENSORS = {
    "head": (f"{P}lm_head.lora_A.weight", "weights of lm_head are not supported"),
    "whole head": (f"{P}lm_head.weight", "weights of lm_head are not supported"),
    "embedding": (f"{P}model.embed_tokens.lora_embedding_A", "weights of embed_tokens are not supported"),
    "saved module": (f"{P}model.norm.modules_to_save.weight", "weights of modules_to_save are not supported"),
    "norm": (f"{P}model.norm.weight", f"unexpected tensor '{P}model.norm.weight'"),
    "vision": (
        f"{P}model.vision_tower.layers.0.self_attn.q_proj.lora_A.weight",
        f"unexpected tensor '{P}model.vision_tower.layers.0",
    ),
    "bias of a pair": (f"{P}model.layers.0.self_attn.q_proj.lora_B.bias", "unexpected tensor"),
    "two adapters": (f"{A}.law.weight", "are those of two models or adapters"),
    "two models": (
        f"{P}model.language_model.layers.0.self_attn.q_proj.lora_A.weight",
        "are those of two models or adapters",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_not_mapped_are_refused_by_name(name, model, tmp_path):
    tensor, message = TENSORS[name]
    write(tmp_path / "in", {(0, Q): 4, (1, Q): 4}, target_modules=["q_proj"])
    with_tensor(tmp_path / "in", tensor)
    with pytest.raises(UserError) as caught:
        import_peft(tmp_path / "in", model, tmp_path / "out")
    assert message in str(caught.value)
    assert tensor in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert findings(tmp_path / "in", model) != {tmp_path / "in": []}


SETTINGS = {
    "no pattern": ({"rank_pattern": {"(q": 2}}, "rank_pattern['(q']: missing ), unterminated subpattern"),
    "rank": ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj'] is 0, expected a whole number from 1"),
    "alpha": ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern['q_proj'] is 'x', expected a number from"),
    "a list": ({"alpha_pattern": [1]}, "alpha_pattern is [1], expected an object"),
    "many expressions": (
        {"rank_pattern": {f"q{i}+": 1 for i in range(33)}},
        "rank_pattern has over 32 regular expressions",
    ),
    "layers": ({"layers_to_transform": ["0"]}, "layers_to_transform is ['0'], expected numbers of layers"),
    "true": ({"layers_to_transform": True}, "layers_to_transform is True, expected numbers of layers"),
    "layers of an expression": (
        {"target_modules": ".*q_proj", "layers_to_transform": [0]},
        "layers_to_transform needs a list of target_modules",
    ),
    "a list alone": ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
    "a list by an expression": (
        {"layers_to_transform": [0], "layers_pattern": "(h|layers)"},
        "layers_pattern is '(h|layers)', expected names of lists of layers",
    ),
    "another list": (
        {"layers_to_transform": [0], "layers_pattern": "h"},
        "with exclude_modules and layers_to_transform no module of the base is left",
    ),
    "head": ({"target_modules": r"lm_head|.*q_proj"}, "target_modules fits 'lm_head'"),
    "excluded": ({"exclude_modules": [3]}, "exclude_modules is [3], expected a list of names"),
    "megatron": ({"megatron_config": {"a": 1}}, "megatron_config is {'a': 1}, expected unset"),
    "parameters": (
        {"target_parameters": ["experts.up"]},
        "target_parameters is ['experts.up'], expected unset",
    ),
    "kasa": ({"kasa_config": {"beta": 1}}, "kasa_config is {'beta': 1}, expected unset"),
    "loftq": (
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
        "init_lora_weights is 'loftq'",
    ),
    "corda": ({"init_lora_weights": "corda", "corda_config": {"a": 1}}, "this start changes the base's own"),
    "lora-ga": (
        {"init_lora_weights": "lora_ga"},
        "save_pretrained(path_initial_model_for_weight_conversion=",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_are_not_mapped_are_refused_by_name(name, model, tmp_path):
    config, message = SETTINGS[name]
    write(tmp_path / "in", {(0, Q): 4, (1, Q): 4}, **{"target_modules": ["q_proj"], **config})
    with pytest.raises(UserError) as caught:
        import_peft(tmp_path / "in", model, tmp_path / "out")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_settings_of_what_is_switched_off_are_no_reason_to_refuse(tmp_path):
    """PEFT ignores them too, or they only say how an adapter began."""
    off = {
        "eva_config": {"rho": 2.0},
        "init_lora_weights": "eva",
        "loftq_config": {"loftq_bits": 4},
        "corda_config": {"corda_method": "ipm"},
        "megatron_core": "megatron.core",
        "ensure_weight_tying": True,
        "qalora_group_size": 16,
        "layer_replication": None,
        "rank_pattern": None,
        "alpha_pattern": {},
        "layers_to_transform": [],
        "exclude_modules": [],
        "target_parameters": [],
    }
    write(tmp_path, {(0, Q): 4, (1, Q): 4}, target_modules=["q_proj"], **off)
    assert read_peft_settings(tmp_path).plan(2).keys() == {(0, "q"), (1, "q")}


def test_a_tensor_under_two_names_is_refused(model, tmp_path):
    write(tmp_path, {(0, Q): 4, (1, Q): 4}, target_modules=["q_proj"], use_dora=True)
    with_tensor(tmp_path, A.replace("lora_A", "lora_magnitude_vector.weight"), (32,))
    with pytest.raises(UserError, match="is there under two names"):
        read_any_adapter(tmp_path, model)


def test_several_adapters_in_folders_are_named(model, tmp_path):
    for name in ("law", "med"):
        write(tmp_path / name, {(0, Q): 4, (1, Q): 4}, target_modules=["q_proj"])
    for read in (
        lambda path: read_any_adapter(path, model),
        lambda path: import_peft(path, model, tmp_path / "out"),
        read_adapter,
    ):
        with pytest.raises(UserError) as caught:
            read(tmp_path)
        assert f"holds 2 PEFT adapters in its folders: expected one, {tmp_path / 'law'} or" in str(
            caught.value
        )
    assert read_any_adapter(tmp_path / "law", model)[0].method.name == "lora"
    assert findings(tmp_path, model) == {tmp_path / "law": [], tmp_path / "med": []}
    write(tmp_path, {(0, V): 4, (1, V): 4}, target_modules=["v_proj"])
    assert import_peft(tmp_path, model, tmp_path / "out")[0] == (
        "the adapters in its folders are not read: law, med"
    )
    assert load_adapter(tmp_path / "out").params["v"].b.any()


def test_a_workdir_with_an_export_in_a_folder_of_its_own_is_a_workdir(run, model, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    write(tmp_path / "run" / "peft", {(0, Q): 4, (1, Q): 4}, target_modules=["q_proj"])
    assert load_adapter(tmp_path / "run").method.name == "milora"
    assert [path.parent.name for path in findings(tmp_path / "run", model)] == ["best"]


def test_embeddings_of_new_tokens_beside_an_adapter_are_refused(model, tmp_path):
    write(tmp_path, {(0, Q): 4, (1, Q): 4}, target_modules=["q_proj"])
    (tmp_path / "new_embeddings.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"found new_embeddings.safetensors, but embeddings of new tokens"):
        read_any_adapter(tmp_path, model)
