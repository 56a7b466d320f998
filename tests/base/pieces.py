"""The pieces of a LLaMA that are compared with Hugging Face's: the configs, the inputs, our values."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from milora_jax.base import ops
from milora_jax.base.attention import attention
from milora_jax.base.attention_context import scoring_of
from milora_jax.base.load import load_base, logits
from milora_jax.base.modules import decode_layout
from milora_jax.base.transformer import AdaptedLayer, block
from milora_jax.model_config import Llama3Scaling, ModelConfig
from milora_jax.types import EXPERTS

PLAIN = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    num_heads=3,
    num_kv_heads=3,
    head_dim=8,
    norm_eps=1e-5,
    rope_theta=1e4,
    max_positions=64,
    eos_ids=(2,),
)
GROUPED = dataclasses.replace(
    PLAIN,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=10,
    norm_eps=1e-3,
    rope_theta=5e5,
    rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 16),
    tie_embeddings=True,
    biased=EXPERTS,
)
CONFIGS = {"plain": PLAIN, "grouped": GROUPED}
TOLERANCE = {"logits": 1e-4}
"""Everything else is held to PIECE_TOLERANCE."""
PIECE_TOLERANCE = 1e-5

ROWS, LENGTH = 2, 13


def inputs(config: ModelConfig) -> dict[str, np.ndarray]:
    """Tokens ``[B, T]`` and a residual stream ``[B, T, D]``."""
    rng = np.random.default_rng(7)
    return {
        "tokens": rng.integers(0, config.vocab_size, (ROWS, LENGTH)),
        "hidden": rng.normal(size=(ROWS, LENGTH, config.hidden_size)).astype(np.float32),
        "query": rng.normal(size=(ROWS, LENGTH, config.num_heads, config.head_dim)).astype(np.float32),
    }


def ours(config: ModelConfig, folder: Path) -> dict[str, np.ndarray]:
    """Our value of every piece, of the model in ``folder``."""
    given = {name: jnp.asarray(value) for name, value in inputs(config).items()}
    base, read = load_base(folder)
    assert read == config
    layer = decode_layout(base).layers[0]
    hidden = given["hidden"]
    positions = jnp.broadcast_to(jnp.arange(LENGTH)[None, :], (ROWS, LENGTH))
    frequencies = ops.rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    cos, sin = ops.rope_tables(positions, frequencies)
    ones = jnp.ones((ROWS, LENGTH), jnp.int32)
    mask = ops.attention_mask(ones, ones, 0)
    scoring = scoring_of(config)

    def heads(x):
        return x.reshape(ROWS, LENGTH, -1, config.head_dim)

    q, k, v = (heads(output) for output in layer.project(0, hidden))
    q, k = (ops.apply_rope(x, cos, sin) for x in (q, k))
    attended = attention(q, k, v, mask, scoring).reshape(ROWS, LENGTH, -1)
    plain = AdaptedLayer(layer, None, None, None, None)
    block_out, _ = block(config, plain, hidden, (cos, sin), lambda q, k, v: attention(q, k, v, mask, scoring))
    values = {
        "norm": ops.rms_norm(hidden, layer.norms.attention[...], config.norm_eps, False),
        "rope": ops.apply_rope(given["query"], cos, sin),
        "attention": layer.project(1, attended)[0],
        "block": block_out,
        "logits": logits(base, config, given["tokens"].astype(jnp.int32)),
    }
    return jax.tree.map(np.asarray, values)


def compare(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Assert that every piece agrees within its tolerance."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = np.abs(found[name] - value).max()
        assert difference <= TOLERANCE.get(name, PIECE_TOLERANCE), (name, difference)
        assert np.abs(value).max() > 0.1, f"{name} says nothing"
