"""Text in, text out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from milora_jax.adapters.protocol import Adapter, Shape
from milora_jax.adapters.registry import adapter_shape
from milora_jax.base.transformer import Base, adapter_decode_layout, decode_layout
from milora_jax.config import ModelConfig, require
from milora_jax.data.batches import collate_prompts, padded_length
from milora_jax.data.tokens import encode_prompt
from milora_jax.errors import UserError
from milora_jax.generation.decode import generate_tokens
from milora_jax.types import Batch

BUCKET = 32
"""Prompts are padded to a multiple of this, so that few prefill programs are compiled."""


@dataclass(frozen=True)
class Answer:
    """One generated continuation.

    Attributes:
      text: decoded, without special tokens.
      tokens: new token ids up to and including the end-of-sequence token.
      route: routing weights ``[L, E]`` of the prompt; None without a router.
    """

    text: str
    tokens: tuple[int, ...]
    route: np.ndarray | None


def generate(
    base: Base,
    config: ModelConfig,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    adapter: Adapter | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    place: Callable[[Batch], Batch] = jax.device_put,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Greedy answers to prompts, in their order.

    Args:
      base: from ``load_base``; turned into the decode layout where it is not yet.
      tokenizer: from ``milora_jax.data.tokens.load_tokenizer``.
      prompts: full prompt texts; ``milora_jax.data.prompts.prompt_text`` renders a record.
      adapter: from ``load_adapter``; None answers with the plain base.
      max_new_tokens: longest answer in tokens.
      batch_size: prompts decoded together.
      place: puts a batch on the devices; the default takes the first device.
      progress: called with the number of answers each time some are ready.

    Raises:
      UserError: for an empty prompt, or one too long for the model with its answer; for an adapter
        that was made for a base of another shape.
    """
    require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "at least 1")
    require(not isinstance(prompts, str), "prompts", prompts, "a list of prompts")
    if adapter is not None and adapter.shape != adapter_shape(config):
        raise UserError(
            f"the adapter fits a base of {_said(adapter.shape)}, this one has {_said(adapter_shape(config))}"
        )
    room = config.max_positions - max_new_tokens
    encoded = [encode_prompt(tokenizer, text) for text in prompts]
    for i, (text, ids) in enumerate(zip(prompts, encoded, strict=True)):
        if not text.strip():
            raise UserError(f"prompt {i} is empty")
        if len(ids) > room:
            raise UserError(
                f"prompt {i} has {len(ids)} tokens: expected at most {room} "
                f"({config.max_positions} positions less {max_new_tokens} new tokens)"
            )
    if not isinstance(base.layers, tuple):
        base = decode_layout(base)
    if adapter is not None and not isinstance(adapter.params, tuple):
        adapter = adapter_decode_layout(adapter)
    # Rows of like length share a batch: less padding, and fewer decode steps after the last answer.
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        length = padded_length(max(len(encoded[i]) for i in rows), BUCKET, room)
        batch = collate_prompts([encoded[i] for i in rows], length, 0, "left", rows=batch_size)
        tokens, route = generate_tokens(base, adapter, place(batch), config, max_new_tokens)
        weights = None if route is None else np.asarray(route.weights)[:, :, 0]
        for row, i in enumerate(rows):
            new = _until_end(tokens[row], config.eos_ids)
            text = tokenizer.decode(new, skip_special_tokens=True)
            answers[i] = Answer(text, tuple(new), None if weights is None else weights[:, row])
        if progress is not None:
            progress(len(rows))
    return [answers[i] for i in range(len(encoded))]


def _said(shape: Shape) -> str:
    return f"{shape.num_layers} layers, width {shape.hidden_size} and modules {dict(shape.modules)}"


def _until_end(tokens: np.ndarray, end_ids: tuple[int, ...]) -> list[int]:
    """The tokens up to and including the first end-of-sequence token."""
    ids = tokens.tolist()
    ends = [i for i, token in enumerate(ids) if token in end_ids]
    return ids[: ends[0] + 1] if ends else ids
