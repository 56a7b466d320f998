"""Prefill of a group of prompts in one program."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from milora_jax.base.attention import DeviceLayout
from milora_jax.base.modules import Base, ends_of
from milora_jax.data.batches import collate_prompts
from milora_jax.generation.adapter_stack import AdapterStack
from milora_jax.generation.decode import Prefilled, prefill
from milora_jax.generation.lengths import bucket_of
from milora_jax.generation.prompt_logprobs import PromptLogprobs, prompt_logprobs
from milora_jax.generation.request import Request
from milora_jax.model_config import ModelConfig
from milora_jax.parallel.rules import place_rows
from milora_jax.shapes import Array, Float


def prefill_group(
    base: Base,
    adapters: AdapterStack | None,
    config: ModelConfig,
    group: Sequence[Request],
    rows: int,
    cache_length: int,
    layout: DeviceLayout | None,
) -> tuple[Prefilled, Float[Array, "L R E"] | None, tuple[PromptLogprobs, ...] | None]:
    """Run prompts of one adapter and one length bucket.

    Args:
      base: in the decode layout.
      rows: rows of the program, at least the requests of the group.
      cache_length: cache positions of a batch slot, without the method's prefix.
      layout: of rows and heads over several devices.

    Returns:
      What decoding starts from, the routing weights, and the log-probabilities of the prompts if some request
      wants them.
    """
    bucket = bucket_of(len(group[0].prompt), cache_length)
    prompts, scopes = [request.prompt for request in group], [request.route_tokens for request in group]
    batch = collate_prompts(prompts, bucket, 0, rows, scopes)
    slot, prefix = np.int32(group[0].adapter_slot), 0 if adapters is None else adapters.method.prefix_length
    prefilled, route = prefill(
        base, adapters, slot, place_rows(batch, layout), config, prefix + cache_length, layout
    )
    scores = None
    if any(request.settings.prompt_logprobs for request in group):
        following = np.roll(batch.tokens, -1, axis=1)
        scores = (prompt_logprobs(ends_of(base), config, prefilled.hidden, following),)
    weights = None if route is None else route.weights[:, :, 0]
    return dataclasses.replace(prefilled, hidden=None), weights, scores
