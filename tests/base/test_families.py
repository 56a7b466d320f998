"""Every family computes what transformers computes: stored values always, live torch with ``-m parity``."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from milora_jax.base.hf_config import read_model_config
from milora_jax.base.load import load_base, logits
from milora_jax.base.modules import decode_layout
from milora_jax.base.transformer import forward, unembed
from milora_jax.errors import UserError
from milora_jax.generation.engine import Engine
from milora_jax.generation.settings import GenerationSettings
from milora_jax.types import Batch
from tests.families import FAMILY_CONFIGS
from tests.models import write_hf_directory

GOLDEN = Path(__file__).parent / "golden" / "families"
ROWS, LENGTH, NEW = 2, 17, 12
"""Rows are longer than any window, and generation goes on until the prompt has left it."""

TOLERANCE = 1e-4


def tokens_of(config):
    return np.random.default_rng(3).integers(4, config.vocab_size, (ROWS, LENGTH))


def reference(config, folder):
    """Logits of two rows, and a greedy continuation of each, as transformers computes them in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    tokens = torch.from_numpy(tokens_of(config))
    with torch.no_grad():
        found = model(tokens).logits.numpy()
        made = tokens
        for _ in range(NEW):  # without a cache: whatever it did, it would have to equal this
            made = torch.cat([made, model(made).logits[:, -1:].argmax(-1)], dim=1)
    return {"logits": found, "greedy": made[:, LENGTH:].numpy()}


def ours(folder):
    base, config = load_base(folder)
    tokens = tokens_of(config)
    found = np.asarray(logits(base, config, jnp.asarray(tokens)))
    endless = dataclasses.replace(config, eos_ids=())
    engine = Engine(decode_layout(base), endless, None, batch_slots=ROWS, cache_length=64)
    # Rows of one batch: the shorter one is padded, and must not notice.
    made = [engine.submit([int(t) for t in row], GenerationSettings(max_new_tokens=NEW)) for row in tokens]
    engine.run()
    return {"logits": found, "greedy": np.array([request.tokens[0] for request in made])}


def compare(found, expected):
    assert np.abs(expected["logits"]).max() > 0.5
    assert np.abs(found["logits"] - expected["logits"]).max() <= TOLERANCE
    np.testing.assert_array_equal(found["greedy"], expected["greedy"])


@pytest.fixture
def folder(tmp_path, name):
    write_hf_directory(tmp_path, FAMILY_CONFIGS[name], tokenizer=False)
    return tmp_path


@pytest.mark.thorough
@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_a_family_equals_its_stored_values(name, folder):
    with np.load(GOLDEN / f"{name}.npz") as stored:
        compare(ours(folder), dict(stored))


@pytest.mark.parity
@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_a_family_equals_live_transformers(name, folder):
    live = reference(FAMILY_CONFIGS[name], folder)
    compare(ours(folder), live)
    with np.load(GOLDEN / f"{name}.npz") as stored:
        compare(live, dict(stored))


@pytest.mark.parity
@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_what_transformers_writes_is_read(name, folder, tmp_path_factory):
    """Its newer spellings, and its shards."""
    import torch
    from transformers import AutoModelForCausalLM

    again = tmp_path_factory.mktemp("again")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(again, max_shard_size="30KB")
    assert read_model_config(again) == FAMILY_CONFIGS[name]
    np.testing.assert_array_equal(ours(again)["logits"], ours(folder)["logits"])


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_a_config_survives_writing_and_reading(name, folder):
    assert read_model_config(folder) == FAMILY_CONFIGS[name]


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3_text", "qwen3_moe"])
def test_layers_in_a_tuple_equal_layers_in_a_scan(name, folder):
    base, config = load_base(folder)
    tokens = jnp.asarray(tokens_of(config), jnp.int32)
    unrolled = decode_layout(base)
    hidden = forward(unrolled, config, Batch.unpadded(tokens)).hidden
    found = unembed(unrolled, config, hidden)
    assert np.abs(found - logits(base, config, tokens)).max() <= TOLERANCE


def edited(folder, **changes):
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value != "absent"}))
    return folder


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "qwen3",
            {"use_sliding_window": None, "attn_logit_softcapping": 5.0},
            "attn_logit_softcapping is 5.0",
        ),
        ("gemma", {"query_pre_attn_scalar": 8}, "query_pre_attn_scalar is 8: expected unset"),
        ("gemma", {"hidden_activation": "relu"}, "hidden_activation is 'relu': expected one of silu"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 4}, "expected 4 of 'sliding_attention'"),
        ("gemma2", {"layer_types": ["full_attention"]}, "expected 4 of 'sliding_attention'"),
        ("gemma2", {"sliding_window": 0}, "sliding_window is 0: expected a whole number of at least 1"),
        ("mistral", {"attention_bias": True}, "attention_bias is True: expected unset"),
        ("mistral", {"num_experts": 8}, "num_experts is 8: expected unset"),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ("phi3", {"partial_rotary_factor": 0.75}, "partial_rotary_factor is 0.75"),
        ("phi3", {"rope_scaling": {"type": "longrope"}}, "rope_type is 'longrope'"),
        ("mistral", {"model_type": "deepseek_v3"}, "is 'deepseek_v3': expected one of llama, mistral"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2: expected unset"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers is [1]: expected unset"),
        ("qwen3_moe", {"num_local_experts": 7}, "num_experts is 8: expected the same as in"),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob is 1: expected true or false"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "moe_intermediate_size is None: expected a whole"),
        ("mixtral", {"num_experts_per_tok": 6}, "num_experts_per_tok is 6: expected at most the 5 experts"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts is 0: expected a whole number of at least"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1: expected unset"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0: expected unset"),
        ("olmoe", {"sliding_window": 8}, "sliding_window is 8: expected unset"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(name, changes, message, folder):
    with pytest.raises(UserError) as caught:
        load_base(edited(folder, **changes))
    assert message in str(caught.value)
    assert "config.json" in str(caught.value)


OFF = {"sliding_window": None, "sliding_pattern": (False,)}


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("mistral", {"sliding_window": None}, OFF),
        ("mistral", {"sliding_window": "absent"}, {"sliding_window": 4096}),
        ("qwen2", {"use_sliding_window": False}, OFF),
        (
            "qwen2",
            {"layer_types": "absent", "max_window_layers": 1},
            {"sliding_pattern": (False, True, True, True)},
        ),
        ("gemma", {"hidden_activation": "absent", "hidden_act": "gelu"}, {}),
        ("gemma", {"hidden_activation": None, "tie_word_embeddings": "absent"}, {}),
        ("gemma2", {"layer_types": "absent"}, {}),
        ("gemma3_text", {"layer_types": "absent", "sliding_window_pattern": 4}, {}),
        (
            "gemma3_text",
            {
                "rope_theta": "absent",
                "rope_scaling": "absent",
                "rope_local_base_freq": "absent",
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            },
            {},
        ),
        ("gemma3_text", {"rope_theta": "absent", "rope_local_base_freq": "absent"}, {}),
        ("qwen3_moe", {"num_experts": "absent", "num_local_experts": 8}, {}),
        ("qwen3_moe", {"mlp_only_layers": [], "decoder_sparse_step": 1}, {}),
        ("qwen3_moe", {"norm_topk_prob": "absent"}, {"norm_topk_prob": False}),
        ("olmoe", {"num_experts": "absent"}, {"num_experts": 64}),
        ("mixtral", {"num_local_experts": "absent", "num_experts_per_tok": "absent"}, {"num_experts": 8}),
    ],
)
def test_a_config_is_read_in_every_spelling(name, changes, expected, folder):
    found = read_model_config(edited(folder, **changes))
    assert found == dataclasses.replace(FAMILY_CONFIGS[name], **expected)


@pytest.mark.parametrize("name", ["gemma3_text"])
@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_of_a_model_with_images(name, prefix, folder):
    before, _ = load_base(folder)
    path = folder / "model.safetensors"
    tensors = {prefix + tensor.removeprefix("model."): value for tensor, value in load_file(path).items()}
    beside = {"vision_tower.x": np.ones(2, np.float32), "model.multi_modal_projector.y": np.ones(2, np.int32)}
    save_file({**tensors, **beside}, path)
    values = json.loads((folder / "config.json").read_text())
    nested = {"model_type": "gemma3", "text_config": values, "vision_config": {"hidden_size": 8}}
    (folder / "config.json").write_text(json.dumps(nested))
    found, config = load_base(folder)
    assert config == FAMILY_CONFIGS[name]
    jax.tree.map(np.testing.assert_array_equal, found, before)


@pytest.mark.parametrize("name", ["qwen3"])
def test_a_generation_config_may_end_texts_earlier(name, folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2, 5]}))
    assert read_model_config(folder).eos_ids == (2, 7, 5)


def main():
    """Write the stored values; needs torch."""
    import tempfile

    GOLDEN.mkdir(exist_ok=True)
    for name, config in FAMILY_CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            write_hf_directory(Path(folder), config, tokenizer=False)
            np.savez_compressed(GOLDEN / f"{name}.npz", **reference(config, Path(folder)))


if __name__ == "__main__":
    main()
