"""Load a plain base and compute its logits."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

from milora_jax.base.hf import Progress, ignore, load_leaves
from milora_jax.base.hf_config import read_model_config
from milora_jax.base.modules import Base
from milora_jax.base.source import model_directory
from milora_jax.base.transformer import forward, unembed
from milora_jax.config import DTYPES, QUANTIZE
from milora_jax.errors import one_of, require
from milora_jax.model_config import ModelConfig
from milora_jax.shapes import Array, Float, Int
from milora_jax.types import Batch


def load_base(
    path: str | Path,
    dtype: str = "float32",
    *,
    decode: bool = False,
    quantize: str = "none",
    progress: Progress = ignore,
) -> tuple[Base, ModelConfig]:
    """Load a frozen base from a Hugging Face directory of one of ``base.families``.

    Args:
      path: directory with ``config.json`` and safetensors files, or ``hf://OWNER/NAME[@REVISION]``, or
        ``gs://BUCKET/PATH``.
      dtype: dtype in which the leaves are stored and computed, whatever the files hold.
      decode: load the layout for decoding, which cannot be trained; ``generate`` can convert the other
        layout, but both are then in memory at the same time.
      quantize: store the matrices of the layers as int8 (a scale per output) or nf4 (a scale per block of 64
        inputs); norms, embedding and head stay in ``dtype``, in which everything is computed.
      progress: called with the bytes of the base read so far and their total.

    Raises:
      UserError: a file, a tensor or a setting is wrong; the error names it.
    """
    require(dtype in DTYPES, "dtype", dtype, f"one of {', '.join(DTYPES)}")
    one_of("quantize", quantize, QUANTIZE)
    directory = model_directory(path)
    config = read_model_config(directory)
    base = load_leaves(directory, config, dtype, decode=decode, quantize=quantize, progress=progress)
    return base, config


def logits(base: Base, config: ModelConfig, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """Next-token logits of the plain base, in float32.

    Args:
      tokens: full rows without padding, T at most ``config.max_positions``.

    Raises:
      UserError: the tokens have another shape, are too long, or outside the vocabulary.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    require(tokens.ndim == 2, "tokens", tokens.shape, "two axes, [B, T]")
    require(
        tokens.shape[1] <= config.max_positions,
        "row length",
        tokens.shape[1],
        f"at most max_positions {config.max_positions}",
    )
    inside = bool(((tokens >= 0) & (tokens < config.vocab_size)).all())
    require(inside, "a token id", "outside the vocabulary", f"0 to {config.vocab_size - 1}")
    return _logits(base, tokens, config)


@jax.jit(static_argnames="config")
def _logits(base: Base, tokens: Int[Array, "B T"], config: ModelConfig) -> Float[Array, "B T V"]:
    return unembed(base, config, forward(base, config, Batch.unpadded(tokens)).hidden)
