"""Continuous batching: waiting requests are admitted as batch slots become free.

An :class:`Engine` owns one running batch with a fixed number of slots. ``submit`` queues a request; ``step``
admits the requests that fit, starts the next chunk of decode steps, and hands out the tokens of the chunk
before, so that the device computes one chunk while the host reads the last.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from milora_jax.base.attention import DeviceLayout, device_layout
from milora_jax.base.cache import read_block
from milora_jax.base.modules import Base
from milora_jax.errors import UserError, require
from milora_jax.generation.adapter_stack import AdapterStack, GatheredAdapters, gather_adapter
from milora_jax.generation.block_prefill import BLOCK
from milora_jax.generation.block_queue import BlockQueue
from milora_jax.generation.constraint import Constraint, full_masks
from milora_jax.generation.decode import (
    Decoded,
    Prefilled,
    admit,
    decode_chunk,
    decode_logits,
    decode_masked,
)
from milora_jax.generation.decode_state import empty_state
from milora_jax.generation.group_prefill import prefill_group
from milora_jax.generation.merge import merged_base
from milora_jax.generation.prefix_cache import PrefixCache
from milora_jax.generation.prompt_logprobs import PromptLogprobs
from milora_jax.generation.prompt_lookup import MOST_PROPOSALS, PromptLookup
from milora_jax.generation.request import Request, require_decodable
from milora_jax.generation.results import (
    PendingResults,
    RunningSample,
    lookup_of,
    masks_of,
    sampler_of,
)
from milora_jax.generation.running_batch import RunningBatch
from milora_jax.generation.sampling import Plan, Sampler
from milora_jax.generation.settings import GenerationSettings
from milora_jax.generation.waiting import WaitingRequests
from milora_jax.model_config import ModelConfig

CHUNK = 16
"""Decode steps between two checks for sequences that have ended."""


class Engine:
    """A running batch.

    Args:
      base: in the decode layout.
      adapters: the adapters; None decodes the plain base.
      batch_slots: B, samples that are decoded together.
      cache_length: cache positions of a batch slot: the longest prompt and continuation together; 0 takes
        the model's positions.
      chunk: decode steps between two checks for sequences that have ended.
      penalties: whether requests may have penalties and biases, which cost nine bytes per row and word.
      prefill_rows: prompts of one length bucket and one adapter that are prefilled together.
      merge: continue one prompt at a time, with its adapter folded into a copy of the weights.
      plans: of which the first that does all that is asked is compiled; none makes one for every mixture of
        requests, as small as can be.
      layout: device layout of prompts, batch slots and heads over several devices; None lets XLA decide.
      prefill_budget: prompt tokens that are prefilled between two chunks of decode steps while others
        decode; 0 sets no limit.
      prefix_cache: bytes for keys and values of earlier prompts; 0 keeps none. With either, prompts are
        prefilled as in ``generation.block_prefill``, unless merged, in rows, or with a method's prefix.
      prefill_block: tokens of such a block.
      prompt_lookup: tokens that prompt look-up proposes to each row at each step; 0 switches it off.

    Attributes:
      adapters: to be set again after a bank has loaded an adapter, whose old buffers are gone then.
      prefix_cache: keys and values of earlier prompts; None without one.
    """

    def __init__(
        self,
        base: Base,
        config: ModelConfig,
        adapters: AdapterStack | None = None,
        *,
        batch_slots: int = 8,
        cache_length: int = 0,
        chunk: int = CHUNK,
        penalties: bool = True,
        prefill_rows: int = 1,
        merge: bool = False,
        plans: Sequence[Plan] = (),
        layout: DeviceLayout | None = None,
        prefill_budget: int = 0,
        prefix_cache: int = 0,
        prefill_block: int = BLOCK,
        prompt_lookup: int = 0,
    ) -> None:
        cache_length = cache_length or config.max_positions
        room = f"2 to the model's {config.max_positions} positions"
        require(2 <= cache_length <= config.max_positions, "cache_length", cache_length, room)
        sizes = {"prefill_rows": prefill_rows, "prefill_block": prefill_block}
        _require_least(1, batch_slots=batch_slots, chunk=chunk, **sizes)
        _require_least(0, prefill_budget=prefill_budget, prefix_cache=prefix_cache)
        most = min(MOST_PROPOSALS, cache_length - 1)
        require(0 <= prompt_lookup <= most, "prompt_lookup", prompt_lookup, f"0 to {most}")
        self.config, self.cache_length, self.chunk = config, cache_length, chunk
        self.adapters, self.batch_slots, self.prefill_rows = adapters, batch_slots, prefill_rows
        self._base, self._penalties, self._plans = base, penalties, tuple(plans)
        self._layout = layout or device_layout(base.devices)
        self._merges, self._prompt_lookup = merge and adapters is not None, prompt_lookup
        self._merged: Base | None = None
        prefix = 0 if adapters is None else adapters.method.prefix_length
        self._routed = adapters is not None and adapters.method.routes
        self._waiting = WaitingRequests(batch_slots, cache_length, prefill_rows, alone=self._merges)
        sliced = (prefill_budget or prefix_cache) and not (prefix or self._merges or prefill_rows > 1)
        self.prefix_cache = PrefixCache(prefix_cache, prefill_block) if sliced and prefix_cache else None
        positions = -(-cache_length // prefill_block) * prefill_block if sliced else prefix + cache_length
        read = read_block(positions, next(iter(base.devices)).platform)
        one = self._of_samples(RunningSample.all_of(Request((), GenerationSettings())))
        sizes = config, base.dtype, *one, batch_slots, positions, self._routed, self._layout, read
        self._batch = RunningBatch(functools.partial(empty_state, *sizes), self._layout)
        blocks = prefill_budget, prefill_block, self.prefix_cache
        self._blocks = BlockQueue(base, config, self._batch, *blocks) if sliced else None
        self._pending = PendingResults(config.eos_ids, self.end)
        self._clear()

    def _clear(self) -> None:
        """Forget all requests that are not waiting."""
        self._admitting: list[Request] = []
        if self._blocks is not None:
            self._blocks.clear()
        self._slots: list[RunningSample | None] = [None] * self.batch_slots
        self._gathered: GatheredAdapters | None = None
        if self.adapters is not None and self.adapters.path == "gathered":
            self._gathered = GatheredAdapters.empty(self.adapters, self.batch_slots)

    def fail(self) -> list[Request]:
        """End every running request after a step raised, since the device's state may be incomplete.

        Returns:
          The requests that ended, and those that had got tokens before it raised; waiting ones are kept.
        """
        in_slots = [sample.request for sample in self._slots if sample is not None]
        for request in (*in_slots, *self._pending.drop(), *self._admitting):
            for sample in range(request.settings.num_samples):
                self._pending.end(request, sample, "error")
        self._clear()
        self._batch.clear()
        return self._pending.touched()

    def check(self, prompt: Sequence[int], settings: GenerationSettings) -> None:
        """Refuse a request that this engine cannot decode.

        Raises:
          UserError: naming what is wrong with this one request.
        """
        require(settings.num_beams == 1, "num_beams", settings.num_beams, "1, beams run by themselves")
        require_decodable(self.config, prompt, settings, self.batch_slots, self.cache_length)
        if settings.penalized and not self._penalties:
            raise UserError("a penalty was asked for, but this engine was made without penalties")

    def lower_decoding(self) -> list[jax.stages.Lowered]:
        """Lower the programs of decode steps; once one is compiled, the first step need not compile it."""
        chunks = (decode_chunk.lower(*self._decode_inputs(self.chunk, plan)) for plan in self._plans)
        return [*chunks, decode_logits.lower(*self._decode_inputs())]

    def compile_prefill(self, length: int) -> bool:
        """Compile what only prompts of about this length need; False where only running one does that."""
        if self._blocks is not None:
            self._blocks.compile_route(self.adapters, length)
        return self._blocks is not None

    def submit(
        self,
        prompt: Sequence[int],
        settings: GenerationSettings,
        adapter_slot: int = 0,
        *,
        cache_scope: str | None = None,
        route_tokens: int = 0,
        constraint: Constraint | None = None,
    ) -> Request:
        """Queue a prompt.

        Args:
          adapter_slot: slot of its adapter in the bank.
          cache_scope, route_tokens: see ``generation.request.Request``.
          constraint: constrains the tokens of each sample.

        Raises:
          UserError: for a prompt or settings that cannot be decoded here; nothing is queued then.
        """
        self.check(prompt, settings)
        require(0 <= route_tokens <= len(prompt), "route_tokens", route_tokens, f"0 to {len(prompt)}")
        ids = tuple(int(token) for token in prompt)
        request = Request(ids, settings, adapter_slot, route_tokens, cache_scope, constraint=constraint)
        self._waiting.add(request)
        return request

    def end(self, request: Request, sample: int, reason: str) -> None:
        """End a sample from outside, because of a stop string or because its client has disconnected.

        Its batch slot goes to the next request; the tokens that the device still computes are dropped.
        """
        if request.finish[sample] is None:
            request.finish[sample] = reason
        for row, held in enumerate(self._slots):
            if held is None or held.request is not request:
                continue
            # A prompt that is being prefilled for several samples keeps all of their slots.
            if request.done if held.prefilling else held.sample == sample:
                self._slots[row] = None
        if request.done:
            self._waiting.discard(request)
            if self._blocks is not None:
                self._blocks.cancel(request)

    @property
    def free_slots(self) -> int:
        """Batch slots that no running or waiting request needs."""
        return max(0, self._slots.count(None) - self._waiting.samples)

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return not (self._waiting or self._pending or any(self._slots))

    def run(self) -> None:
        """Step until every request is done."""
        while not self.idle:
            self.step()

    def step(self) -> list[Request]:
        """Admit requests, start a chunk, and read the results of the previous work.

        Returns:
          The requests that got tokens or ended.
        """
        self._admit()
        prefilled = () if self._blocks is None else self._blocks.turn(self.adapters, any(self._decoding))
        for prompt in prefilled:
            for row in prompt.rows[1:]:
                self._batch.copy(prompt.rows[0], row)
            self._start(*prompt.work.result(), prompt.samples, prompt.rows)
        running = [each for each in self._decoding if each is not None and each.left > 0]
        if any(each.constraint is not None for each in running):
            self._step_with_masks()
        else:
            if running:
                self._start_chunk()
            # The device computes one while the host reads another.
            self._pending.read(unread=1 if running else 0)
        return self._pending.touched()

    @property
    def _decoding(self) -> list[RunningSample | None]:
        """The samples in the batch slots, but those whose prompt is still being prefilled."""
        return [sample if sample and not sample.prefilling else None for sample in self._slots]

    def _admit(self) -> None:
        """Prefill waiting requests into free batch slots, in their order."""
        while True:
            free = [row for row, sequence in enumerate(self._slots) if sequence is None]
            group = self._admitting = self._waiting.take(len(free))
            if not group:
                return
            self._prefill(group, free[: sum(request.settings.num_samples for request in group)])

    def _prefill(self, group: list[Request], rows: list[int]) -> None:
        """Prefill some requests, or one of several samples, and put them into batch slots."""
        samples = [sample for request in group for sample in RunningSample.all_of(request)]
        if self._blocks is not None:
            for row, sample in zip(rows, samples, strict=True):
                self._slots[row] = sample
            self._blocks.add(samples, rows, self._routed)
            self._admitting = []
            return
        how = self.prefill_rows, self.cache_length, self._layout
        prefilled, weights, scores = prefill_group(self._base, self.adapters, self.config, group, *how)
        if self._merges and self.adapters is not None:
            adapter = self.adapters.of_slot(jnp.asarray(group[0].adapter_slot))
            chosen = None if weights is None else np.asarray(weights[:, 0])
            self._merged = merged_base(self._base, adapter, chosen)
        self._start(prefilled, weights, scores, samples, rows)

    def _start(
        self,
        prefilled: Prefilled,
        weights: Any,
        scores: tuple[PromptLogprobs, ...] | None,
        samples: Sequence[RunningSample],
        rows: list[int],
    ) -> None:
        """Put what was prefilled into batch slots, and choose the first tokens.

        Args:
          weights: of the routes, ``[L, R, E]``; None without a router.
          scores: log-probabilities of the prompts, in parts; None where none are wanted.
          samples: one for each prompt, or several of the first one.
        """
        several = len(samples) > 1 and samples[0].request is samples[1].request
        count = 1 if several else self.prefill_rows
        if several and self.prefill_rows > 1:
            prefilled = jax.tree.map(lambda leaf: leaf[:1], prefilled)
        # Samples of one prompt one by one: a program for every number of them would be one more to compile.
        for first in range(0, len(samples), count):
            group, slots = samples[first : first + count], rows[first : first + count]
            # Slots beyond the batch are dropped, so that a group that is not full has its program's shape.
            beyond = range(self.batch_slots, self.batch_slots + count - len(slots))
            places = np.array([*slots, *beyond], np.int32)
            padded = [*group, *([group[0]] * (count - len(group)))]
            sampler, lookup = self._of_samples(padded)
            slot = np.int32(group[0].request.adapter_slot)
            plan = self._plan(group)
            masks = masks_of(padded, self.config.vocab_size, self._pending.end)
            if masks is not None and self._plans:
                plan = self._plans[-1]  # one program more, and not one for each plan
            starts = places, np.full(count, slot), sampler, lookup, plan
            self._batch.state, choice = admit(self._batch.state, prefilled, *starts, self._layout, masks)
            if self._gathered is not None and self.adapters is not None:
                self._gathered = gather_adapter(self._gathered, self.adapters, places, slot)
            for row, sample in zip(slots, group, strict=True):
                wanted = sample.request.finish[sample.sample] is None  # or it was ended while it waited
                self._slots[row] = sample if wanted and self._stays(sample) else None
            self._pending.add(group, Decoded.first(choice), weights, scores)
        self._admitting = []

    def _start_chunk(self) -> None:
        inputs = self._decode_inputs(self.chunk, self._plan(self._decoding))
        self._batch.state, decoded = decode_chunk(*inputs)
        self._note_started(decoded, self.chunk)

    def _step_with_masks(self) -> None:
        """Start a single decode step, and give it the masks of its tokens once those before it are read."""
        self._batch.state, logits = decode_logits(*self._decode_inputs())
        self._pending.read()
        masks = masks_of(self._decoding, self.config.vocab_size, self._pending.end)
        if masks is None:  # the last constrained sample has just ended
            masks = full_masks(self.batch_slots, self.config.vocab_size)
        plan = self._plan(self._decoding)
        self._batch.state, decoded = decode_masked(self._batch.state, logits, masks, plan, self._layout)
        self._note_started(decoded, 1)

    def _weights(self) -> tuple[Base, AdapterStack | GatheredAdapters | None]:
        if self._merged is not None:
            return self._merged, None
        return self._base, self.adapters if self._gathered is None else self._gathered

    def _decode_inputs(self, *steps_and_plan: Any) -> tuple[Any, ...]:
        held = np.array([sample is not None for sample in self._decoding])
        return *self._weights(), self._batch.state, self.config, *steps_and_plan, self._layout, held

    def _note_started(self, decoded: Decoded, steps: int) -> None:
        self._pending.add(self._decoding, decoded)
        for row, sequence in enumerate(self._decoding):
            if sequence is not None:
                sequence.left -= steps
                self._slots[row] = sequence if self._stays(sequence) else None

    def _stays(self, sequence: RunningSample) -> bool:
        """Whether a sequence needs its batch slot for longer than what has been started for it.

        The slot of a sequence whose last token is being computed goes to the next request at once, before the
        token is read, since the device runs its work in order. Only a merged base serves one request to its
        end.
        """
        return sequence.left > 0 or self._merges

    def _of_samples(self, samples: Sequence[RunningSample]) -> tuple[Sampler, PromptLookup | None]:
        """What the device must know of samples before their first tokens."""
        lookup = lookup_of(samples, self.cache_length, self._prompt_lookup)
        return sampler_of(samples, self.config, self._penalties), lookup

    def _plan(self, samples: Sequence[RunningSample | None]) -> Plan:
        least = Plan.of([sample.request.settings for sample in samples if sample is not None])
        return next((plan for plan in self._plans if plan.covers(least)), least)


def _require_least(least: int, **sizes: int) -> None:
    for name, value in sizes.items():
        require(value >= least, name, value, f"at least {least}")
