"""The queue of prompts that an engine prefills block by block, and its scheduling."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from milora_jax.base.modules import Base
from milora_jax.generation.adapter_stack import AdapterStack
from milora_jax.generation.block_prefill import BlockPrefill
from milora_jax.generation.prefix_cache import PrefixCache
from milora_jax.generation.request import Request
from milora_jax.generation.results import RunningSample
from milora_jax.generation.running_batch import RunningBatch
from milora_jax.model_config import ModelConfig
from milora_jax.shapes import Array

UNHURRIED = 4
"""Factor on the budget of a turn while no request decodes. A larger one would make a new prompt wait."""


@dataclass(eq=False)
class Prefilling:
    """A request whose prompt is being prefilled.

    Attributes:
      samples: samples of the request, which hold batch slots already.
      rows: these slots.
    """

    work: BlockPrefill
    samples: Sequence[RunningSample]
    rows: list[int]


class BlockQueue:
    """Divides a budget of slices among the prompts that are being prefilled.

    The oldest prompt has half of every turn; the rest goes to the prompts that are nearest to their end, so
    that a short prompt does not wait for a long one, and a long one is not put off for ever.

    Args:
      base: in the decode layout.
      batch: the running batch, in whose rows the prompts are prefilled.
      budget: prompt tokens a turn, through all layers; 0 sets no limit.
      block: tokens of a block.
      cache: keys and values of earlier prompts; None for none.
    """

    def __init__(
        self,
        base: Base,
        config: ModelConfig,
        batch: RunningBatch,
        budget: int,
        block: int,
        cache: PrefixCache | None = None,
    ) -> None:
        self._base, self._config, self._batch = base, config, batch
        self._block, self._cache = block, cache
        self._slices = max(1, budget * config.num_layers // block) if budget else sys.maxsize
        self._prompts: list[Prefilling] = []
        self._in_flight: list[Array] = []

    def add(self, samples: Sequence[RunningSample], rows: list[int], routed: bool) -> Prefilling:
        """Queue the prompt of a request after those that are queued.

        Args:
          samples: all of the request.
          rows: batch slots that are kept for them.
          routed: whether the adapter has a router.
        """
        request, kept = samples[0].request, None
        scored = request.settings.prompt_logprobs > 0  # which needs what every block leaves behind
        if self._cache is not None and request.cache_scope is not None and not scored:
            kept = self._cache.find(request.cache_scope, request.prompt, request.route_tokens, routed)
        self._batch.make_ready(rows[0])
        work = BlockPrefill(
            self._base,
            self._config,
            request.prompt,
            request.adapter_slot,
            self._batch,
            rows[0],
            block=self._block,
            route_tokens=request.route_tokens,
            kept=kept,
            scored=scored,
        )
        request.cached_tokens = work.cached_tokens
        for sample in samples:
            sample.prefilling = True
        self._prompts.append(Prefilling(work, samples, rows))
        return self._prompts[-1]

    def cancel(self, request: Request) -> None:
        """Remove the prompt of a request."""
        self._prompts = [each for each in self._prompts if each.samples[0].request is not request]

    def clear(self) -> None:
        """Remove all prompts."""
        self._prompts, self._in_flight = [], []

    def compile_route(self, adapters: AdapterStack | None, length: int) -> None:
        """Compile the one program that depends on the length of a prompt."""
        prompt, block = [0] * length, self._block
        BlockPrefill(self._base, self._config, prompt, 0, self._batch, 0, block=block).compile_route(adapters)

    def turn(self, adapters: AdapterStack | None, decoding: bool) -> list[Prefilling]:
        """Start the slices of one turn, once those of the previous turn have been run.

        Args:
          adapters: the present adapters; loading one replaces the buffers of a bank.
          decoding: whether other requests decode, which wait for these slices.

        Returns:
          The prompts that are done, and no longer in the queue.
        """
        jax.block_until_ready(self._in_flight)
        self._in_flight = []
        left = self._slices if decoding else UNHURRIED * self._slices
        if self._prompts:
            left -= self._run(self._prompts[0], max(1, left // 2), adapters)
        for prompt in sorted(self._prompts, key=lambda each: each.work.slices):
            left -= self._run(prompt, left, adapters)
        done = [prompt for prompt in self._prompts if not prompt.work.slices]
        self._prompts = [prompt for prompt in self._prompts if prompt.work.slices]
        for prompt in done:
            self._keep(prompt)
            for sample in prompt.samples:
                sample.prefilling = False
        return done

    def _keep(self, prompt: Prefilling) -> None:
        """Put what later prompts may share into the prefix cache."""
        request = prompt.samples[0].request
        if self._cache is not None and request.cache_scope is not None:
            kept = prompt.work.to_keep()
            self._cache.keep(request.cache_scope, request.prompt, request.route_tokens, kept)

    def _run(self, prompt: Prefilling, most: int, adapters: AdapterStack | None) -> int:
        """Start at most so many slices of a prompt; returns how many."""
        slices = min(most, prompt.work.slices)
        if slices:
            self._in_flight.append(prompt.work.advance(slices, adapters))
        return slices
