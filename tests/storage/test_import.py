"""A PEFT directory becomes an adapter, all of it, or is refused by name."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from milora_jax.errors import UserError
from milora_jax.storage.adapter_tensors import read_tensors, write_tensors
from milora_jax.storage.adapters import best_metadata, load_adapter, require_its_base
from milora_jax.storage.export import export_peft
from milora_jax.storage.imported import import_peft
from milora_jax.storage.peft_settings import PEFT_CONFIG, PEFT_TENSORS
from milora_jax.storage.verify import findings
from milora_jax.types import EXPERTS
from tests.families import FAMILY_CONFIGS
from tests.models import TINY, write_hf_directory
from tests.storage.adapters import assert_equal, run_of


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    """A LoRA and a DoRA, and where PEFT's form of them lies."""
    folder = tmp_path_factory.mktemp("peft")
    made = {}
    for method in ("lora", "dora"):
        made[method] = run_of(folder / f"{method}-run", model, method, alpha=6.0, dropout=0.1)
        export_peft(folder / f"{method}-run", folder / method, "base")
    return folder, made


def stranger(folder, tmp_path, kind="lora"):
    """A copy of a PEFT directory as PEFT leaves it, without anything of ours."""
    copy = tmp_path / "theirs"
    shutil.copytree(folder / kind, copy)
    for name in ("manifest.json", "export.json"):
        (copy / name).unlink()
    return copy


def change_config(folder, **fields):
    values = json.loads((folder / PEFT_CONFIG).read_text())
    (folder / PEFT_CONFIG).write_text(json.dumps(values | fields))


def change_tensors(folder, change):
    tensors = dict(read_tensors(folder / PEFT_TENSORS))
    change(tensors)
    (folder / PEFT_TENSORS).unlink()
    write_tensors(folder / PEFT_TENSORS, tensors)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_imported_adapter_is_the_adapter(kind, adapters, model, tmp_path):
    folder, made = adapters
    assert import_peft(stranger(folder, tmp_path, kind), model, tmp_path / "out") == []
    assert_equal(load_adapter(tmp_path / "out"), made[kind])
    assert require_its_base(best_metadata(tmp_path / "out"), tmp_path / "out", model) == "none"
    assert findings(tmp_path / "out", model) == {tmp_path / "out": []}


def test_a_rank_stabilised_adapter_stays_one(model, tmp_path):
    made = run_of(tmp_path / "run", model, "dora", alpha=6.0, use_rslora=True)
    export_peft(tmp_path / "run", tmp_path / "peft", "base")
    values = json.loads((tmp_path / "peft" / PEFT_CONFIG).read_text())
    assert (values["lora_alpha"], values["r"], values["use_rslora"]) == (6, 4, True)
    import_peft(tmp_path / "peft", model, tmp_path / "out")
    assert_equal(load_adapter(tmp_path / "out"), made)


@pytest.mark.parametrize(("kind", "method"), [("lora", "milora"), ("dora", "midora")])
def test_an_imported_adapter_can_be_the_experts(kind, method, adapters, model, tmp_path):
    folder, made = adapters
    said = import_peft(folder / kind, model, tmp_path / "out", method, seed=3)
    assert said == ["the router is fresh: it chooses 3 of 7 experts at random until it is trained"]
    found = load_adapter(tmp_path / "out")
    assert (found.method.name, found.method.rank, found.method.alpha) == (method, 4, 6.0)
    jax.tree.map(np.testing.assert_array_equal, found.params.experts, made[kind].params)
    assert float(np.std(found.params.router.weight)) == pytest.approx(0.02, rel=0.2)


def test_a_base_that_keeps_modules_together_is_refused(adapters, tmp_path):
    folder, _ = adapters
    write_hf_directory(tmp_path / "phi", FAMILY_CONFIGS["phi3"], tokenizer=False)
    with pytest.raises(UserError, match="is a 'phi3', whose files keep Q, K, V and gate, up together"):
        import_peft(folder / "lora", tmp_path / "phi", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_modules_without_pairs_stay_as_they_are(kind, adapters, model, tmp_path):
    folder, made = adapters
    theirs = stranger(folder, tmp_path, kind)
    change_config(theirs, target_modules=["v_proj", "self_attn.q_proj"])
    change_tensors(theirs, lambda t: [t.pop(n) for n in list(t) if "q_proj" not in n and "v_proj" not in n])
    assert findings(theirs, model) == {theirs: []}
    assert import_peft(theirs, model, tmp_path / "out") == []
    found = load_adapter(tmp_path / "out")
    assert (found.method.name, found.method.target_modules) == (kind, "q_proj,v_proj")
    assert_equal(
        found,
        dataclasses.replace(made[kind], method=found.method, params={n: made[kind].params[n] for n in "qv"}),
    )
    assert findings(tmp_path / "out", model) == {tmp_path / "out": []}


def test_experts_without_pairs_are_told_and_change_nothing(adapters, model, tmp_path):
    folder, made = adapters
    theirs = stranger(folder, tmp_path)
    change_config(theirs, target_modules=["v_proj", "self_attn.q_proj"])
    change_tensors(theirs, lambda t: [t.pop(n) for n in list(t) if "q_proj" not in n and "v_proj" not in n])
    said = import_peft(theirs, model, tmp_path / "out", "milora")
    assert said[0] == "no pairs for k, o, gate, up, down: theirs are fresh and change nothing"
    found = load_adapter(tmp_path / "out").params.experts
    for name in EXPERTS:
        same = name in ("q", "v")
        assert np.array_equal(found[name].b, made["lora"].params[name].b) == same
        assert bool(np.any(found[name].b)) == same
        assert np.any(found[name].a), "a pair of zeros could never be trained"


def test_rank_stabilised_scaling_and_half_precision_are_read(adapters, model, tmp_path):
    folder, made = adapters
    theirs = stranger(folder, tmp_path)
    change_config(theirs, use_rslora=True)
    change_tensors(theirs, lambda t: t.update({name: value.astype(np.float16) for name, value in t.items()}))
    import_peft(theirs, model, tmp_path / "out")
    found = load_adapter(tmp_path / "out")
    assert found.method.scale == pytest.approx(6.0 / np.sqrt(4))
    rounded = np.asarray(made["lora"].params["q"].a).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(found.params["q"].a, rounded)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def renamed(tensors):
    for name in list(tensors):
        tensors[name.replace(".model.model.", ".model.")] = tensors.pop(name)


SETTINGS = {
    "peft_type": ("IA3", "peft_type is 'IA3', expected 'LORA'"),
    "r": (8, "has shape [4, 48], expected [8, 48]"),
    "lora_alpha": (0, "lora_alpha is 0, expected a number from 1e-06 to 1e+09 (0 changes nothing)"),
    "lora_dropout": (1.0, "lora_dropout is 1.0"),
    "target_modules": (
        ["q_proj", "c_attn"],
        "names 'c_attn', expected some of q_proj, k_proj",
    ),
    "use_dora": (True, "lora_magnitude_vector' is missing"),
    "use_rslora": ("yes", "use_rslora is 'yes', expected true or false"),
    "bias": ("all", "bias is 'all', expected 'none'"),
    "fan_in_fan_out": (True, "fan_in_fan_out is True, expected False"),
    "lora_bias": (True, "lora_bias is True, expected unset: not supported"),
    "modules_to_save": (["lm_head"], "modules_to_save is ['lm_head'], expected unset"),
    "layers_to_transform": ([0], "unexpected tensor 'base_model.model.model.layers.1."),
    "rank_pattern": ({"q_proj": 8}, "q_proj.lora_A.weight' has shape [4, 32], expected [8, 32]"),
    "exclude_modules": (["k_proj"], "self_attn.k_proj.lora_A.weight'"),
    "layer_replication": ([[0, 2]], "layer_replication is [[0, 2]], expected unset"),
    "trainable_token_indices": ([1], "trainable_token_indices is [1], expected unset"),
    "use_qalora": (True, "use_qalora is True, expected unset"),
    "init_lora_weights": ("pissa", "init_lora_weights is 'pissa', expected True or False or 'gaussian'"),
    "some_new_thing": (1, "some_new_thing is 1, expected unset: not supported"),
}
ILL_TYPED = {
    "no kind": ({"peft_type": None}, "peft_type is None"),
    "kind is a list": ({"peft_type": ["LORA"]}, "peft_type is ['LORA']"),
    "rank is a word": ({"r": "4"}, "r is '4', expected a whole number"),
    "rank is true": ({"r": True}, "r is True, expected a whole number"),
    "giant rank": ({"r": 10**9}, "r is 1000000000, expected a whole number from 1 to 65536"),
    "alpha is all but nothing": (
        {"lora_alpha": 1e-300},
        "lora_alpha is 1e-300, expected a number from 1e-06",
    ),
    "alpha is not finite": ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
    "alpha is no number": ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    "targets by a pattern that fits none": (
        {"target_modules": "q_proj"},
        "target_modules is 'q_proj', and with exclude_modules and layers_to_transform no module",
    ),
    "no targets": ({"target_modules": []}, "target_modules is [], expected a list"),
    "targets of one layer": (
        {"target_modules": ["layers.2.self_attn.q_proj"]},
        "names 'layers.2.self_attn.q_proj', expected some of q_proj",
    ),
    "fewer targets": ({"target_modules": ["q_proj"]}, "unexpected tensor"),
}
CASES = {
    **{
        name: (lambda f, n=name, v=value: change_config(f, **{n: v}), said)
        for name, (value, said) in SETTINGS.items()
    },
    **{name: (lambda f, v=values: change_config(f, **v), said) for name, (values, said) in ILL_TYPED.items()},
    "no config": (lambda f: (f / PEFT_CONFIG).unlink(), "no such file or directory, expected a regular file"),
    "config is no JSON": (lambda f: (f / PEFT_CONFIG).write_text("r: 4"), "not readable JSON"),
    "duplicate setting": (
        lambda f: (f / PEFT_CONFIG).write_text('{"r": 4, "r": 8}'),
        "the name 'r' occurs twice",
    ),
    "endless config": (lambda f: (f / PEFT_CONFIG).write_text(" " * 2**21), "expected at most 1048576"),
    "config elsewhere": (
        lambda f: ((f / PEFT_CONFIG).rename(f / "real"), (f / PEFT_CONFIG).symlink_to("real")),
        "a symbolic link, expected a regular file",
    ),
    "pickle": (lambda f: (f / PEFT_TENSORS).rename(f / "adapter_model.bin"), "pickles are never loaded"),
    "pickle beside it": (lambda f: (f / "adapter_model.bin").write_bytes(b"x"), "pickles are never loaded"),
    "pickle under a good name": (
        lambda f: (f / PEFT_TENSORS).write_bytes(b"\x80\x04x" * 9),
        "not a whole safetensors",
    ),
    "no tensors": (lambda f: (f / PEFT_TENSORS).unlink(), "no such file or directory"),
    "tensors elsewhere": (
        lambda f: ((f / PEFT_TENSORS).rename(f / "real"), (f / PEFT_TENSORS).symlink_to(f / "real")),
        "a symbolic link",
    ),
    "no name matches": (lambda f: change_tensors(f, renamed), "no tensor has an expected name"),
    "a tensor missing": (lambda f: change_tensors(f, lambda t: t.pop(A)), f"tensor {A!r} is missing"),
    "a tensor too many": (
        lambda f: change_tensors(f, lambda t: t.update({"base_model.model.lm_head.weight": t[A]})),
        "unexpected tensor 'base_model.model.lm_head.weight'",
    ),
    "a tensor transposed": (
        lambda f: change_tensors(f, lambda t: t.update({A: t[A].T})),
        f"tensor {A!r} has shape [32, 4], expected [4, 32]",
    ),
    "a tensor of doubles": (
        lambda f: change_tensors(f, lambda t: t.update({A: t[A].astype(np.float64)})),
        "has dtype float64, expected float32 or float16 or bfloat16",
    ),
    "not finite": (
        lambda f: change_tensors(f, lambda t: t.update({A: t[A] * np.float32(np.nan)})),
        "not finite",
    ),
    "a silent no-op": (
        lambda f: change_tensors(f, lambda t: t.update({n: v * 0 for n, v in t.items() if "lora_B" in n})),
        "every product of lora_A and lora_B is zero: the adapter changes nothing",
    ),
    "a silent no-op by A": (
        lambda f: change_tensors(f, lambda t: t.update({n: v * 0 for n, v in t.items() if "lora_A" in n})),
        "every product of lora_A and lora_B is zero: the adapter changes nothing",
    ),
    "a silent no-op by halves": (
        lambda f: change_tensors(
            f, lambda t: t.update({n: v * 0 for n, v in t.items() if ("q_proj" in n) == ("lora_A" in n)})
        ),
        "every product of lora_A and lora_B is zero: the adapter changes nothing",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_directory_is_refused_by_name_and_nothing_is_written(name, adapters, model, tmp_path):
    change, message = CASES[name]
    theirs = stranger(adapters[0], tmp_path)
    change(theirs)
    with pytest.raises(UserError) as caught:
        import_peft(theirs, model, tmp_path / "out")
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(theirs))
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_base_of_another_shape_is_refused(adapters, tmp_path):
    config = TINY.__class__(**{**vars(TINY), "num_layers": 1})
    write_hf_directory(tmp_path / "base", config, tokenizer=False)
    with pytest.raises(UserError, match=r"unexpected tensor 'base_model.model.model.layers.1.mlp.down_proj"):
        import_peft(stranger(adapters[0], tmp_path / "x"), tmp_path / "base", tmp_path / "out")
    found = findings(stranger(adapters[0], tmp_path), tmp_path / "base")
    assert len(next(iter(found.values()))) == 14, "the pairs of seven modules of one layer"


def test_our_own_export_is_taken_for_its_base_and_as_it_was_written(adapters, tmp_path):
    theirs, other = tmp_path / "theirs", tmp_path / "other"
    shutil.copytree(adapters[0] / "lora", theirs)
    write_hf_directory(other, seed=5, tokenizer=False)
    with pytest.raises(UserError, match="are not those that the adapter of"):
        import_peft(theirs, other, tmp_path / "out")
    with (theirs / PEFT_TENSORS).open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    with pytest.raises(UserError, match="content differs from its SHA-256"):
        import_peft(theirs, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64])
def test_a_seed_out_of_range_is_refused(adapters, model, tmp_path, seed):
    with pytest.raises(UserError, match=f"--seed is {seed}: expected 0 to 4294967295"):
        import_peft(adapters[0] / "lora", model, tmp_path / "out", "milora", seed)


@pytest.mark.parametrize(
    ("kind", "method", "message"),
    [
        ("lora", "midora", "holds a lora, which cannot become a midora: expected lora or milora"),
        ("dora", "milora", "holds a dora, which cannot become a milora: expected dora or midora"),
        ("lora", "ia3", "which cannot become a ia3"),
    ],
)
def test_a_kind_that_cannot_become_another_is_refused(kind, method, message, adapters, model, tmp_path):
    with pytest.raises(UserError, match=message):
        import_peft(adapters[0] / kind, model, tmp_path / "out", method)


def test_a_dora_of_some_modules_is_one_of_experts_whose_others_change_nothing(adapters, model, tmp_path):
    theirs = stranger(adapters[0], tmp_path, "dora")
    change_config(theirs, target_modules=["q_proj"])
    change_tensors(theirs, lambda t: [t.pop(n) for n in list(t) if "q_proj" not in n])
    said = import_peft(theirs, model, tmp_path / "out", "midora")
    assert said[0] == "no pairs for k, v, o, gate, up, down: theirs are fresh and change nothing"
    experts = load_adapter(tmp_path / "out").params.experts
    jax.tree.map(np.testing.assert_array_equal, experts["q"], adapters[1]["dora"].params["q"])
    assert not any(np.any(experts[name].b) for name in EXPERTS if name != "q")
