"""Pallas' splash attention for TPUs, causal within a record."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from milora_jax.base.ops import Scoring
from milora_jax.shapes import Array, Float, Int
from milora_jax.types import KEPT

LANES = 128
"""Rows are padded to a multiple of this; a head must be as wide, or half as wide."""

BLOCKS = (512, 384, 256, 128)
"""Block sizes of the kernel in tokens, tried in this order."""


def serves(q: Float[Array, "B T N H"]) -> bool:
    """Whether the kernel accepts queries of this shape and is worth its launch."""
    suits = q.dtype in (jnp.bfloat16, jnp.float32)  # the compiler has no loads of float16
    return suits and q.shape[-1] in (LANES // 2, LANES) and q.shape[1] >= LANES


def splash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    window: int | None,
    scoring: Scoring,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """``attention.attention`` where queries and keys belong to the same tokens.

    Args:
      window: number of tokens that a query sees, itself included; None for all.
      interpret: run it as plain operations on any platform, for tests.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length = q.shape[1]
    padded = -(-length // LANES) * LANES

    def by_head(x: Array) -> Array:
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padded - length), (0, 0)))

    block = next(size for size in BLOCKS if padded % size == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    shape = (padded, padded)
    mask: Any = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    kernel: Any = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * q.shape[2]),
        block_sizes=kernels.BlockSizes(**dict.fromkeys(names, block), block_kv_compute=LANES),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=scoring.cap,
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )
    records = jnp.pad(segments, ((0, 0), (0, padded - length)))
    scaled = (q.astype(jnp.float32) * scoring.scale).astype(q.dtype)

    def one_row(q: Array, k: Array, v: Array, records: Array) -> Array:
        return kernel(q, k, v, kernels.SegmentIds(q=records, kv=records))

    attended = jax.vmap(one_row)(by_head(scaled), by_head(k), by_head(v), records)
    return attended[:, :, :length].swapaxes(1, 2)
