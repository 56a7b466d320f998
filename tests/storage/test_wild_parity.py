"""Directories that PEFT itself writes, in all its forms, give its logits here or are refused by name."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from milora_jax.base.load import load_base
from milora_jax.errors import UserError
from milora_jax.storage.adapters import load_adapter
from milora_jax.storage.imported import import_peft, read_any_adapter
from milora_jax.storage.peft_settings import PEFT_CONFIG, PEFT_TENSORS
from milora_jax.storage.verify import findings
from tests.models import TINY, tame_base, write_hf_directory
from tests.storage.torch_logits import assert_near, logits_of, their_logits, torch_model

pytestmark = [
    pytest.mark.parity,
    # PEFT asks transformers for a name that transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True"),
    pytest.mark.filterwarnings("ignore:.*eva_config"),
    pytest.mark.filterwarnings("ignore:lora with eva initialization"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'.*have invalid shape"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings("ignore:.*changes the base weights of the model"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
]

CONFIG = dataclasses.replace(TINY, num_layers=3)
TOKENS = np.random.default_rng(5).integers(4, CONFIG.vocab_size, (2, 24)).astype(np.int32)
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|"
    r"ffn|dense)\.(?:(?:q_proj|k_proj|up_proj)))"
)
PATTERNS = {
    "rank_pattern": {"q_proj": 2, r"layers\.[02]\..*down_proj": 7, "^model.layers.1.self_attn.o_proj": 5},
    "alpha_pattern": {
        "v_proj": 3,
        r"model\.layers\.(1|2)\.mlp\.(up|gate)_proj": 16,
        "layers.0.self_attn.q_proj": 1,
    },
}
MAPPED = {
    "plain": {"target_modules": SEVEN},
    "ranks and alphas": {"target_modules": SEVEN, **PATTERNS},
    "ranks and alphas, stabilised": {"target_modules": SEVEN, **PATTERNS, "use_rslora": True},
    "ranks and alphas of a dora": {"target_modules": SEVEN, **PATTERNS, "use_dora": True},
    "every pair has another rank": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_.*": 1, "v.*": 3},
    },
    "two layers": {"target_modules": SEVEN, "layers_to_transform": [0, 2]},
    "one layer by its list": {
        "target_modules": ["q_proj", "down_proj"],
        "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    "all-linear": {"target_modules": "all-linear"},
    "all-linear but": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.1.mlp.up_proj"]},
    "an expression": {"target_modules": r".*\.(q|v)_proj|model\.layers\.[12]\.mlp\.down_proj"},
    "an expression of Unsloth": {"target_modules": UNSLOTH},
    "an expression but": {"target_modules": r".*_proj", "exclude_modules": r".*\.0\..*|.*\.o_proj"},
    "full names": {"target_modules": ["model.layers.0.self_attn.q_proj", "layers.2.mlp.gate_proj", "v_proj"]},
    "dora of some modules": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "dora of one layer": {
        "target_modules": SEVEN,
        "use_dora": True,
        "layers_to_transform": [1],
        "use_rslora": True,
    },
    "gaussian": {"target_modules": SEVEN, "init_lora_weights": "gaussian"},
    "random": {"target_modules": SEVEN, "init_lora_weights": False},
    "orthogonal": {"target_modules": SEVEN, "init_lora_weights": "orthogonal"},
    "mica": {"target_modules": SEVEN, "init_lora_weights": "mica"},
    "eva": {"target_modules": SEVEN, "init_lora_weights": "eva"},
    "fan_in_fan_out, which PEFT takes back": {"target_modules": SEVEN, "fan_in_fan_out": True},
}
REFUSED = {
    "lm_head": ({"target_modules": ["q_proj", "lm_head"]}, "target_modules names 'lm_head'"),
    "embed_tokens": ({"target_modules": ["q_proj", "embed_tokens"]}, "target_modules names 'embed_tokens'"),
    "lm_head by an expression": ({"target_modules": r".*(q_proj|lm_head)"}, "target_modules fits 'lm_head'"),
    "modules_to_save": (
        {"target_modules": SEVEN, "modules_to_save": ["lm_head"]},
        "modules_to_save is ['lm_head'], expected unset",
    ),
    "bias": ({"target_modules": SEVEN, "bias": "all"}, "bias is 'all', expected 'none'"),
    "bias of the pairs": ({"target_modules": SEVEN, "bias": "lora_only"}, "bias is 'lora_only'"),
    "lora_bias": ({"target_modules": SEVEN, "lora_bias": True}, "lora_bias is True, expected unset"),
    "tokens": ({"target_modules": SEVEN, "trainable_token_indices": [3]}, "trainable_token_indices is [3]"),
    "replication": ({"target_modules": SEVEN, "layer_replication": [[0, 2], [1, 3]]}, "layer_replication is"),
    "pissa": (
        {"target_modules": SEVEN, "init_lora_weights": "pissa"},
        "init_lora_weights is 'pissa', expected",
    ),
    "olora": (
        {"target_modules": SEVEN, "init_lora_weights": "olora"},
        "this start changes the base's own weights",
    ),
    "alora": (
        {"target_modules": SEVEN, "alora_invocation_tokens": [5, 6]},
        "alora_invocation_tokens is [5, 6]",
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_hf_directory(folder, CONFIG, tokenizer=False, base=tame_base(CONFIG))
    return folder


@pytest.fixture(scope="module")
def loaded(base):
    return load_base(base)


def wrapped(base, **settings):
    """A model with a random adapter of PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 6, **settings})
    model = get_peft_model(torch_model(base), config).eval()
    fill(model)
    return model


def fill(model, adapter="default"):
    import torch

    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_magnitude_vector" in name:
                p.mul_(1 + 0.3 * torch.randn(p.shape))
            elif "lora_" in name and f".{adapter}" in name:
                p.normal_(0.0, 0.1)


def same(theirs, folder, base, loaded, tmp_path):
    """Both ways in give PEFT's logits, which are not those of the base."""
    assert findings(folder, base) == {folder: []}
    assert findings(folder, None) == {folder: []}
    adapter, _ = read_any_adapter(folder, base)
    assert_near(logits_of(*loaded, adapter, TOKENS)[0], theirs)
    import_peft(folder, base, tmp_path / "imported")
    assert_near(logits_of(*loaded, load_adapter(tmp_path / "imported"), TOKENS)[0], theirs)
    with pytest.raises(AssertionError):
        assert_near(logits_of(*loaded, None, TOKENS)[0], theirs, 1e-2)
    return adapter


@pytest.mark.parametrize("name", MAPPED)
def test_logits_equal_those_of_peft(name, base, loaded, tmp_path):
    model = wrapped(base, **MAPPED[name])
    model.save_pretrained(tmp_path / "adapter")
    same(their_logits(model, TOKENS), tmp_path / "adapter", base, loaded, tmp_path)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_mapped_is_refused_by_name(name, base, tmp_path):
    settings, message = REFUSED[name]
    wrapped(base, **settings).save_pretrained(tmp_path / "adapter")
    for read in (read_any_adapter, lambda folder, base: import_peft(folder, base, tmp_path / "out")):
        with pytest.raises(UserError) as caught:
            read(tmp_path / "adapter", base)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_a_start_that_changed_the_base_is_read_once_peft_has_converted_it(how, base, loaded, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model

    settings = {"target_modules": SEVEN, "init_lora_weights": how}
    fresh = get_peft_model(
        torch_model(base), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **settings)
    ).eval()
    # The adapter as it was at the start, which PEFT subtracts.
    start = tmp_path / "start"
    fresh.peft_config["default"].init_lora_weights = True
    fresh.save_pretrained(start)
    fresh.peft_config["default"].init_lora_weights = how
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in fresh.named_parameters():
            if "lora_" in name:
                p.add_(0.1 * torch.randn(p.shape))
    theirs = their_logits(fresh, TOKENS)
    fresh.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(start))
    assert json.loads((tmp_path / "adapter" / PEFT_CONFIG).read_text())["init_lora_weights"] is True
    adapter = same(theirs, tmp_path / "adapter", base, loaded, tmp_path)
    assert adapter.method.rank == 8


def test_several_adapters_lie_in_folders_and_are_read_by_their_addresses(base, loaded, tmp_path):
    from peft import LoraConfig

    model = wrapped(base, target_modules=SEVEN)
    model.add_adapter("law", LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj"]))
    fill(model, "law")
    both = tmp_path / "both"
    model.save_pretrained(both)
    model.set_adapter("law")
    same(their_logits(model, TOKENS), both / "law", base, loaded, tmp_path)
    model.set_adapter("default")
    assert import_peft(both, base, tmp_path / "root") == ["the adapters in its folders are not read: law"]
    assert_near(logits_of(*loaded, load_adapter(tmp_path / "root"), TOKENS)[0], their_logits(model, TOKENS))
    model.save_pretrained(tmp_path / "named", selected_adapters=["law"])
    with pytest.raises(UserError, match=r"holds 1 PEFT adapters in its folders: expected one, .*named/law"):
        read_any_adapter(tmp_path / "named", base)


@pytest.mark.parametrize("use_dora", [False, True])
def test_tensors_as_they_are_called_in_memory_are_the_same_adapter(use_dora, base, loaded, tmp_path):
    model = wrapped(base, target_modules=["q_proj", "up_proj"], use_dora=use_dora)
    model.save_pretrained(tmp_path / "adapter")
    state = {name: p.detach().numpy() for name, p in model.named_parameters() if "lora_" in name}
    assert all(".default." in name for name in state)
    (tmp_path / "adapter" / PEFT_TENSORS).unlink()
    save_file(state, tmp_path / "adapter" / PEFT_TENSORS)
    same(their_logits(model, TOKENS), tmp_path / "adapter", base, loaded, tmp_path)


def test_an_adapter_of_the_language_model_within_another_is_one_of_it(tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    write_hf_directory(tmp_path / "base", CONFIG, tokenizer=False, base=tame_base(CONFIG))
    text = LlamaConfig(**json.loads((tmp_path / "base" / "config.json").read_text()))
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    torch.manual_seed(0)
    outer = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
    inner = torch_model(tmp_path / "base")
    outer.model.language_model.load_state_dict(inner.model.state_dict())
    outer.lm_head.load_state_dict(inner.lm_head.state_dict())
    settings = LoraConfig(
        r=4, target_modules=r".*language_model.*\.(q|down)_proj", alpha_pattern={"q_proj": 2}
    )
    model = get_peft_model(outer, settings).eval()
    fill(model)
    model.save_pretrained(tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / PEFT_TENSORS)
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)
    loaded = load_base(tmp_path / "base")
    same(their_logits(model, TOKENS), tmp_path / "adapter", tmp_path / "base", loaded, tmp_path)

    everything = get_peft_model(model.unload(), LoraConfig(r=4, target_modules=["q_proj"])).eval()
    fill(everything)
    everything.save_pretrained(tmp_path / "too-much")
    with pytest.raises(UserError, match=r"unexpected tensor '.*vision_tower.*q_proj.lora_A.weight'"):
        read_any_adapter(tmp_path / "too-much", tmp_path / "base")
