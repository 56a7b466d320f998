"""Shapes of published models, for measurements and compilation without their weights."""

from __future__ import annotations

import dataclasses

from milora_jax.config import LLAMA2_7B

SHAPES = {
    "llama2-7b": LLAMA2_7B,
    "llama2-13b": dataclasses.replace(
        LLAMA2_7B, hidden_size=5120, intermediate_size=13824, num_layers=40, num_heads=40, num_kv_heads=40
    ),
    "llama2-70b": dataclasses.replace(
        LLAMA2_7B, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64, num_kv_heads=8
    ),
    "llama3-8b": dataclasses.replace(
        LLAMA2_7B,
        vocab_size=128256,
        intermediate_size=14336,
        num_kv_heads=8,
        rope_theta=5e5,
        max_positions=8192,
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
"""By name: meta-llama's LLaMA-2 and LLaMA-3, and a small one for machines without accelerators."""
