"""Logits of a model in torch and of ours."""

import jax
import jax.numpy as jnp
import numpy as np

from milora_jax.base.transformer import forward, unembed


def torch_model(folder):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def their_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()


def logits_of(base, config, adapter, tokens, **more):
    """Logits of rows without padding, and their route."""
    tokens = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)

    def compute(base, adapter):
        output = forward(base, config, tokens, positions, jnp.ones_like(tokens), adapter=adapter, **more)
        return unembed(base, config, output.hidden), output.route

    logits, route = jax.jit(compute)(base, adapter)
    return np.asarray(logits), route


def assert_near(found, expected, tolerance=1e-5):
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error <= tolerance, error
