"""Shapes of published models, for measuring and compiling without their weights."""

from __future__ import annotations

import dataclasses

from milora_jax.model_config import LLAMA2_7B, Llama3Scaling, ModelConfig

LLAMA3_8B = dataclasses.replace(
    LLAMA2_7B,
    vocab_size=128256,
    intermediate_size=14336,
    num_kv_heads=8,
    rope_theta=5e5,
    max_positions=8192,
    eos_ids=(128001,),
)

GEMMA_2B = ModelConfig(
    vocab_size=256000,
    hidden_size=2048,
    intermediate_size=16384,
    num_layers=18,
    num_heads=8,
    num_kv_heads=1,
    head_dim=256,
    norm_eps=1e-6,
    rope_theta=1e4,
    max_positions=8192,
    eos_ids=(1,),
    tie_embeddings=True,
    activation="gelu_tanh",
    norm_unit_offset=True,
    scale_embedding=True,
    family="gemma",
)

QWEN25_05B = ModelConfig(
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    norm_eps=1e-6,
    rope_theta=1e6,
    max_positions=32768,
    eos_ids=(151643,),
    tie_embeddings=True,
    biased=("q", "k", "v"),
    family="qwen2",
)

SHAPES = {
    "llama2-7b": LLAMA2_7B,
    "llama2-13b": dataclasses.replace(
        LLAMA2_7B, hidden_size=5120, intermediate_size=13824, num_layers=40, num_heads=40, num_kv_heads=40
    ),
    "llama2-70b": dataclasses.replace(
        LLAMA2_7B, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64, num_kv_heads=8
    ),
    "llama3-8b": LLAMA3_8B,
    "llama3.1-8b": dataclasses.replace(
        LLAMA3_8B, max_positions=131072, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192)
    ),
    "llama3.2-1b": dataclasses.replace(
        LLAMA3_8B,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        head_dim=64,
        max_positions=131072,
        rope_scaling=Llama3Scaling(32.0, 1.0, 4.0, 8192),
        tie_embeddings=True,
    ),
    "mistral-7b": dataclasses.replace(
        LLAMA2_7B,
        intermediate_size=14336,
        num_kv_heads=8,
        max_positions=32768,
        sliding_window=4096,
        sliding_pattern=(True,),
        family="mistral",
    ),
    "gemma-2b": GEMMA_2B,
    "gemma2-2b": dataclasses.replace(
        GEMMA_2B,
        hidden_size=2304,
        intermediate_size=9216,
        num_layers=26,
        num_kv_heads=4,
        post_norms=True,
        query_scalar=256.0,
        attention_softcap=50.0,
        final_softcap=30.0,
        sliding_window=4096,
        sliding_pattern=(True, False),
        family="gemma2",
    ),
    "gemma3-1b": dataclasses.replace(
        GEMMA_2B,
        vocab_size=262144,
        hidden_size=1152,
        intermediate_size=6912,
        num_layers=26,
        num_heads=4,
        rope_theta=1e6,
        max_positions=32768,
        post_norms=True,
        qk_norm=True,
        query_scalar=256.0,
        sliding_window=512,
        sliding_pattern=(True, True, True, True, True, False),
        local_rope_theta=1e4,
        family="gemma3_text",
    ),
    "qwen2.5-0.5b": QWEN25_05B,
    "qwen3-0.6b": dataclasses.replace(
        QWEN25_05B,
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        max_positions=40960,
        biased=(),
        qk_norm=True,
        family="qwen3",
    ),
    "llama-30m": dataclasses.replace(
        LLAMA2_7B,
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        num_layers=8,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
        max_positions=2048,
    ),
}
"""Published models of every family by name, and a small LLaMA for machines without accelerators."""
