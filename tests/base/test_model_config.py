"""No field of the model config is dead: each changes what is computed."""

import dataclasses

import jax.numpy as jnp
import pytest

from milora_jax.base.load import logits
from milora_jax.model_config import Llama3Scaling
from tests.base.pieces import GROUPED
from tests.models import random_base

SLIDING = dataclasses.replace(GROUPED, sliding_window=4, sliding_pattern=(True, False))
EXPERTS = dataclasses.replace(
    GROUPED,
    biased=(),
    qk_norm=True,
    num_experts=4,
    experts_per_token=2,
    norm_topk_prob=True,
    family="qwen3_moe",
)
FIELD_CHANGES = {
    "vocab_size": None,
    "hidden_size": None,
    "intermediate_size": None,
    "num_layers": None,
    "num_heads": 2,
    "num_kv_heads": 4,
    "head_dim": None,
    "norm_eps": 1e-1,
    "rope_theta": 1e3,
    "max_positions": None,
    "eos_ids": None,
    "rope_scaling": Llama3Scaling(2.0, 1.0, 4.0, 16),
    "tie_embeddings": False,
    "biased": ("q", "k", "v"),
    "activation": "gelu_tanh",
    "norm_unit_offset": True,
    "post_norms": True,
    "qk_norm": True,
    "qk_norm_all_heads": True,
    "scale_embedding": True,
    "query_scalar": 3.0,
    "attention_softcap": 1.0,
    "final_softcap": 1.0,
    "sliding_window": 5,
    "sliding_pattern": (True,),
    "local_rope_theta": 1e3,
    "num_experts": None,
    "experts_per_token": 1,
    "norm_topk_prob": False,
    "family": None,
}
"""None: the field shapes the leaves, limits the rows or ends the text, which other tests see."""


def test_every_field_of_the_model_config_is_read():
    assert FIELD_CHANGES.keys() == {field.name for field in dataclasses.fields(GROUPED)}


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name, value in FIELD_CHANGES.items() if value is not None])
def test_every_field_of_the_model_config_changes_the_logits(name):
    tokens = jnp.arange(20, dtype=jnp.int32)[None]
    sliding = {"sliding_window", "sliding_pattern", "local_rope_theta"}
    experts = {"experts_per_token", "norm_topk_prob", "qk_norm_all_heads"}
    start = SLIDING if name in sliding else EXPERTS if name in experts else GROUPED
    changed = dataclasses.replace(start, **{name: FIELD_CHANGES[name]})
    before = logits(random_base(start), start, tokens)
    shaped = {"num_heads", "num_kv_heads", "tie_embeddings", "biased", "post_norms", "qk_norm"}
    shaped |= {"qk_norm_all_heads"}
    base = random_base(changed if name in shaped else start)
    after = logits(base, changed, tokens)
    assert float(jnp.abs(before - after).max()) > 1e-4
