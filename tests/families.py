"""A small model of every family, with every difference that the family has switched on."""

import dataclasses

from milora_jax.model_config import LinearScaling, ModelConfig
from tests.models import TINY

WINDOW = 6
"""Shorter than the rows of the tests, so that every sliding layer hides something."""

_FOUR = dataclasses.replace(TINY, num_layers=4)
"""As many layers as the longest pattern of sliding and full ones."""

_GEMMA = dataclasses.replace(
    _FOUR,
    num_kv_heads=1,
    head_dim=12,
    norm_eps=1e-6,
    tie_embeddings=True,
    activation="gelu_tanh",
    norm_unit_offset=True,
    scale_embedding=True,
)

EXPERT_CONFIGS: dict[str, ModelConfig] = {
    "mixtral": dataclasses.replace(
        TINY,
        num_experts=5,
        experts_per_token=2,
        norm_topk_prob=True,
        sliding_window=WINDOW,
        sliding_pattern=(True,),
        family="mixtral",
    ),
    "qwen3_moe": dataclasses.replace(
        TINY,
        head_dim=12,
        qk_norm=True,
        biased=("q", "k", "v", "o"),
        num_experts=8,
        experts_per_token=3,
        norm_topk_prob=True,
        sliding_window=WINDOW,
        sliding_pattern=(True,),
        family="qwen3_moe",
    ),
    "olmoe": dataclasses.replace(
        TINY, qk_norm=True, qk_norm_all_heads=True, num_experts=6, experts_per_token=2, family="olmoe"
    ),
}
"""Families whose feed-forward layers are experts. There are more copies of rows than experts, and fewer."""

FAMILY_CONFIGS: dict[str, ModelConfig] = {
    "mistral": dataclasses.replace(
        _FOUR, sliding_window=WINDOW, sliding_pattern=(True,), rope_theta=1e6, family="mistral"
    ),
    "qwen2": dataclasses.replace(
        _FOUR,
        biased=("q", "k", "v"),
        tie_embeddings=True,
        sliding_window=WINDOW,
        sliding_pattern=(False, False, True, True),
        family="qwen2",
    ),
    "qwen3": dataclasses.replace(_FOUR, head_dim=12, qk_norm=True, family="qwen3"),
    "gemma": dataclasses.replace(_GEMMA, family="gemma"),
    "gemma2": dataclasses.replace(
        _GEMMA,
        num_kv_heads=2,
        post_norms=True,
        query_scalar=20.0,
        attention_softcap=2.0,
        final_softcap=3.0,
        sliding_window=WINDOW,
        sliding_pattern=(True, False),
        family="gemma2",
    ),
    "gemma3_text": dataclasses.replace(
        _GEMMA,
        post_norms=True,
        qk_norm=True,
        query_scalar=20.0,
        sliding_window=WINDOW,
        sliding_pattern=(True, True, True, False),
        rope_theta=1e6,
        rope_scaling=LinearScaling(8.0),
        local_rope_theta=1e4,
        family="gemma3_text",
    ),
    "phi3": dataclasses.replace(_FOUR, sliding_window=WINDOW, sliding_pattern=(True,), family="phi3"),
    **EXPERT_CONFIGS,
}
"""LLaMA itself has tests of its own, with and without each of its options."""
