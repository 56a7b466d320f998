"""Logits of a model in torch and of ours."""

import jax
import jax.numpy as jnp
import numpy as np

from milora_jax.base.transformer import forward, unembed
from milora_jax.types import Batch


def torch_model(folder):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def their_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))).logits.float().numpy()


def logits_of(base, config, adapter, tokens, route=None):
    """Logits of rows without padding, which are prompts from end to end, and their route."""
    batch = Batch.unpadded(jnp.asarray(tokens))
    batch = batch.replace(prompt_mask=~batch.prompt_mask)

    def compute(base, adapter):
        output = forward(base, config, batch, adapter=adapter, route=route)
        return unembed(base, config, output.hidden), output.route

    logits, route = jax.jit(compute)(base, adapter)
    return np.asarray(logits), route


def assert_near(found, expected, tolerance=1e-5):
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error <= tolerance, error
