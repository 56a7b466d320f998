"""LoRA and DoRA on some of the seven modules: the others are the frozen ones, in every form."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.adapters.protocol import init_adapter
from milora_jax.adapters.registry import METHODS, adapter_shape, build_method, stored_settings
from milora_jax.base.modules import frozen_kernels
from milora_jax.config import AdapterSection
from milora_jax.errors import UserError
from milora_jax.generation.bank import Bank
from milora_jax.storage.adapter_tensors import read_tensors
from milora_jax.storage.adapters import load_adapter
from milora_jax.storage.export import export_merged, export_milora, export_peft
from milora_jax.storage.imported import import_peft
from milora_jax.storage.peft import PEFT_CONFIG
from milora_jax.storage.verify import findings
from milora_jax.training.loss import adapted_loss
from milora_jax.types import EXPERTS
from tests.adapted import BASE, make_adapter, row_batch, run, stack, text
from tests.families import FAMILY_CONFIGS
from tests.generation.banks import together
from tests.generation.decoding import DECODING, decoded
from tests.models import TINY, write_hf_directory
from tests.storage.adapters import assert_equal, hidden, run_of

CHOSEN = "down_proj,q_proj"
MODULES = ("q", "down")


def two_rows():
    return stack(row_batch(text(0, 7), text(1, 5)), row_batch(text(2, 4), text(3, 8)))


def whole_of(adapter):
    """The same function with pairs on all seven modules, of which those not chosen are fresh."""
    method = dataclasses.replace(adapter.method, target_modules="all-linear")
    fresh = init_adapter(method, jax.random.key(9), adapter_shape(TINY), frozen_kernels(BASE))
    return dataclasses.replace(fresh, params={**fresh.params, **adapter.params})


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_choice_is_written_in_one_way(method):
    made = build_method(AdapterSection(method=method, target_modules=" down_proj, q_proj,q_proj"))
    assert (made.target_modules, made.modules) == ("q_proj,down_proj", MODULES)
    every = ",".join(f"{name}_proj" for name in reversed(EXPERTS))
    assert build_method(AdapterSection(method=method, target_modules=every)) == build_method(
        AdapterSection(method=method)
    )
    assert stored_settings({"method": method, "rank": 4}).target_modules == "all-linear"


@pytest.mark.parametrize("text", ["", "q_proj,", "lm_head", "q", ".*_proj", "all-linear,q_proj"])
def test_other_names_are_refused(text):
    with pytest.raises(
        UserError, match="expected all-linear, or some of q_proj,k_proj,v_proj,o_proj,gate_pro"
    ):
        build_method(AdapterSection(method="lora", target_modules=text))


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("lora", "dora")])
def test_methods_with_places_of_their_own_say_why(method):
    with pytest.raises(UserError) as error:
        build_method(AdapterSection(method=method, target_modules="all-linear"))
    said = str(error.value)
    assert f"expected none with method {method!r}, wh" in said
    assert said.endswith("; lora and dora have it")
    assert ("routers choose among all seven" in said) == (method in ("milora", "midora"))


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_it_is_the_adapter_whose_other_pairs_change_nothing(method):
    batch, adapter = two_rows(), make_adapter(method=method, target_modules=CHOSEN, alpha=6.0)
    assert tuple(name for name in EXPERTS if name in adapter.params) == MODULES
    assert len(adapter.params) == 2
    found, whole = run(adapter, batch).hidden, run(whole_of(adapter), batch).hidden
    # A fresh DoRA changes its module by rounding.
    tolerance = 0 if method == "lora" else 2e-5
    np.testing.assert_allclose(found, whole, rtol=tolerance, atol=tolerance)
    assert float(jnp.abs(found - run(None, batch).hidden).max()) > 0.1


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_module_is_drawn_alike_and_trained_alone(method):
    fresh = make_adapter(method=method, target_modules=CHOSEN, change=False)
    whole = make_adapter(method=method, change=False)
    jax.tree.map(np.testing.assert_array_equal, fresh.params, {name: whole.params[name] for name in MODULES})
    adapter = make_adapter(method=method, target_modules=CHOSEN, dropout=0.2)

    def loss(params):
        new = dataclasses.replace(adapter, params=params)
        return adapted_loss(new, BASE, TINY, two_rows(), key=jax.random.key(0))[0]

    gradient = jax.jit(jax.grad(loss))(adapter.params)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))
    count = adapter.method.tunable_parameters(adapter.shape)
    assert count == sum(leaf.size for leaf in jax.tree.leaves(adapter.params))


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["lora", pytest.param("dora", marks=pytest.mark.thorough)])
def test_it_is_decoded_alone_and_beside_others(method):
    adapters = [
        make_adapter(seed=10 * i, method=method, target_modules=targets)
        for i, targets in enumerate(("q_proj,v_proj", "all-linear", "o_proj,up_proj"))
    ]
    bank = Bank(DECODING, TINY, adapters[0], 3, path="gathered")
    for i, adapter in enumerate(adapters):
        bank.load(f"tenant {i}", adapter)
    work = [(text(i, 5 + i), i) for i in range(3)]
    alone = [decoded(adapters[slot], [prompt], 8, ignore_eos=True)[0] for prompt, slot in work]
    assert together(bank, work) == alone
    assert decoded(whole_of(adapters[0]), [work[0][0]], 8, ignore_eos=True)[0] == alone[0]
    prompts = [decoded(adapter, [work[0][0]], 8, ignore_eos=True)[0] for adapter in adapters]
    assert len({tuple(tokens) for tokens in prompts}) > 1


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("transformers", reason="a model's directory has a tokenizer")
    folder = tmp_path_factory.mktemp("model")
    write_hf_directory(folder)
    return folder


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_files_hold_the_chosen_modules_and_come_back(method, model, tmp_path):
    made = run_of(tmp_path / "run", model, method, target_modules=CHOSEN, alpha=6.0)
    assert_equal(load_adapter(tmp_path / "run"), made)
    export_milora(tmp_path / "run", tmp_path / "ours")
    export_peft(tmp_path / "run", tmp_path / "peft", "base")
    for place in ("ours", "peft"):
        assert findings(tmp_path / place, model) == {tmp_path / place: []}
    assert_equal(load_adapter(tmp_path / "ours"), made)
    values = json.loads((tmp_path / "peft" / PEFT_CONFIG).read_text())
    assert values["target_modules"] == ["q_proj", "down_proj"]
    import_peft(tmp_path / "peft", model, tmp_path / "again")
    assert_equal(load_adapter(tmp_path / "again"), made)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["llama", pytest.param("phi3", marks=pytest.mark.thorough)])
def test_a_merged_base_keeps_the_other_weights(name, tmp_path):
    """Of phi3, which keeps several modules in one tensor, only the rows of the chosen one change."""
    base = tmp_path / "base"
    write_hf_directory(base, {"llama": TINY, **FAMILY_CONFIGS}[name], tokenizer=False)
    adapter = run_of(tmp_path / "run", base, "lora", alpha=8.0, target_modules=CHOSEN)
    export_merged(tmp_path / "run", base, tmp_path / "out", None, {}, 10**9)
    before, after = (read_tensors(at / "model.safetensors") for at in (base, tmp_path / "out"))
    changed = {key.split(".", 3)[-1] for key in before if not np.array_equal(before[key], after[key])}
    q = "self_attn.qkv_proj" if name == "phi3" else "self_attn.q_proj"
    assert changed == {f"{q}.weight", "mlp.down_proj.weight"}
    np.testing.assert_allclose(hidden(tmp_path / "out"), hidden(base, adapter), atol=1e-4)
