"""Every piece equals Hugging Face's: stored values always, live torch with ``-m parity``."""

import numpy as np
import pytest

from tests.base.pieces import CONFIGS, compare, ours
from tests.base.reference import GOLDEN, reference
from tests.models import write_hf_directory


@pytest.mark.sweep("grouped")
@pytest.mark.parametrize("name", CONFIGS)
def test_pieces_equal_the_stored_values_of_hugging_face(name, tmp_path):
    write_hf_directory(tmp_path, CONFIGS[name], tokenizer=False)
    with np.load(GOLDEN / f"{name}.npz") as stored:
        compare(ours(CONFIGS[name], tmp_path), dict(stored))


@pytest.mark.parity
@pytest.mark.parametrize("name", CONFIGS)
def test_pieces_equal_live_hugging_face(name, tmp_path):
    write_hf_directory(tmp_path, CONFIGS[name], tokenizer=False)
    live = reference(CONFIGS[name], tmp_path)
    compare(ours(CONFIGS[name], tmp_path), live)
    with np.load(GOLDEN / f"{name}.npz") as stored:
        compare(live, dict(stored))


@pytest.mark.parity
@pytest.mark.parametrize("settings", [{}, {"max_shard_size": "20KB"}])
def test_a_model_that_transformers_wrote_gives_the_same_logits(settings, tmp_path):
    import jax.numpy as jnp
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from milora_jax import load_base, logits

    torch.manual_seed(0)
    scaling = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(
        vocab_size=70,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=3e4,
        rope_scaling={**scaling, "original_max_position_embeddings": 16, "rope_theta": 3e4},
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    model.save_pretrained(tmp_path, **settings)
    assert (tmp_path / "model.safetensors.index.json").is_file() == bool(settings)
    tokens = np.random.default_rng(0).integers(0, 70, (2, 40))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    base, read = load_base(tmp_path)
    assert (read.rope_theta, read.rope_scaling.factor) == (3e4, 4.0)
    assert np.abs(np.asarray(logits(base, read, jnp.asarray(tokens))) - expected).max() <= 1e-4
