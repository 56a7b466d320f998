"""Continuous batching: requests take batch slots as these become free.

An :class:`Engine` owns one running batch with a fixed number of slots. ``submit`` queues a request; ``step``
admits the requests that fit, starts the next chunk of decode steps, and hands out the tokens of the chunk
before, so that the device computes one chunk while the host reads the last.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from milora_jax.base.attention import DeviceLayout, device_layout
from milora_jax.base.modules import Base
from milora_jax.data.batches import collate_prompts
from milora_jax.errors import UserError, require
from milora_jax.generation.adapter_stack import AdapterStack, GatheredAdapters, gather_adapter
from milora_jax.generation.decode import admit, decode_chunk, empty_state, prefill, state_shardings_of
from milora_jax.generation.merge import merged_base
from milora_jax.generation.prompt_logprobs import prompt_logprobs
from milora_jax.generation.request import Request, require_served
from milora_jax.generation.results import RunningSample, StartedWork, read_results
from milora_jax.generation.sampling import Plan, Sampler, make_sampler
from milora_jax.generation.settings import GenerationSettings
from milora_jax.model_config import ModelConfig
from milora_jax.types import Batch

CHUNK = 16
"""Decode steps between two checks for sequences that have ended."""

SMALLEST_BUCKET = 32


def bucket_of(length: int, limit: int) -> int:
    """The length to which a prompt is padded: a power of two that depends on the prompt alone.

    >>> [bucket_of(n, 1000) for n in (1, 32, 33, 900)]
    [32, 32, 64, 1000]
    """
    bucket = SMALLEST_BUCKET
    while bucket < length:
        bucket *= 2
    return min(bucket, limit)


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
      place: puts a prefill batch on the devices.
      layout: of batch slots and heads over several devices; None lets XLA decide.

    Attributes:
      adapters: to be set again after a bank has loaded an adapter, whose old buffers are gone then.
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
        place: Callable[[Batch], Batch] = jax.device_put,
        layout: DeviceLayout | None = None,
    ) -> None:
        require(batch_slots >= 1, "batch_slots", batch_slots, "at least 1")
        cache_length = cache_length or config.max_positions
        fits = 2 <= cache_length <= config.max_positions
        require(fits, "cache_length", cache_length, f"2 to the model's {config.max_positions} positions")
        require(chunk >= 1, "chunk", chunk, "at least 1")
        require(prefill_rows >= 1, "prefill_rows", prefill_rows, "at least 1")
        self.config, self.batch_slots, self.chunk = config, batch_slots, chunk
        self.adapters, self.prefill_rows = adapters, prefill_rows
        self._base, self._place, self._penalties, self._plans = base, place, penalties, tuple(plans)
        self._layout = layout or device_layout(base.devices)
        self._merges = merge and adapters is not None
        self._merged: Base | None = None
        prefix = 0 if adapters is None else adapters.method.prefix_length
        self.cache_length, self._prefix = cache_length, prefix
        self._waiting: deque[Request] = deque()
        self._clear()

    def _clear(self) -> None:
        """Start an empty batch."""
        self._admitting: list[Request] = []
        self._touched: dict[int, Request] = {}
        self._slots: list[RunningSample | None] = [None] * self.batch_slots
        self._started: deque[StartedWork] = deque()
        self._gathered: GatheredAdapters | None = None
        if self.adapters is not None and self.adapters.path == "gathered":
            self._gathered = GatheredAdapters.empty(self.adapters, self.batch_slots)
        routed = self.adapters is not None and self.adapters.method.routes
        sampler = self._sampler([GenerationSettings()], [0], [()])
        state = empty_state(
            self.config, self._base, sampler, self.batch_slots, self._prefix + self.cache_length, routed
        )
        places = state_shardings_of(state, self._layout)
        self._state = state if places is None else jax.device_put(state, places)

    def fail(self) -> list[Request]:
        """End every running request after a step raised, since the device's state may be incomplete.

        Returns:
          The requests that ended, and those that had got tokens before it raised; waiting ones are kept.
        """
        begun = [
            sequence
            for sequences in (self._slots, *(work.sequences for work in self._started))
            for sequence in sequences
        ]
        failed = {id(sequence.request): sequence.request for sequence in begun if sequence is not None}
        failed |= {id(request): request for request in self._admitting}
        touched = {**self._touched, **failed}
        for request in failed.values():
            request.finish = [reason or "error" for reason in request.finish]
        self._clear()
        return list(touched.values())

    def check(self, prompt: Sequence[int], settings: GenerationSettings) -> None:
        """Refuse what cannot be decoded here.

        Raises:
          UserError: naming what is wrong with this one request.
        """
        vocab, allowed = self.config.vocab_size, f"0 to {self.config.vocab_size - 1}"
        require(len(prompt) > 0, "prompt", "empty", "at least one token")
        wrong = [token for token in prompt if not 0 <= token < vocab]
        require(not wrong, "a token id of the prompt", wrong[:1], allowed)
        require_served(self.config, settings, self.batch_slots)
        require(settings.num_beams == 1, "num_beams", settings.num_beams, "1, beams run by themselves")
        if settings.penalized and not self._penalties:
            raise UserError("a penalty was asked for, but this engine was made without penalties")
        if len(prompt) + settings.max_new_tokens > self.cache_length:
            raise UserError(
                f"the prompt has {len(prompt)} tokens and may get {settings.max_new_tokens} new ones: "
                f"expected at most {self.cache_length} together"
            )

    def submit(self, prompt: Sequence[int], settings: GenerationSettings, adapter_slot: int = 0) -> Request:
        """Queue a prompt.

        Args:
          adapter_slot: of its adapter in the bank.

        Raises:
          UserError: for a prompt or settings that cannot be decoded here; nothing is queued then.
        """
        self.check(prompt, settings)
        request = Request(tuple(int(token) for token in prompt), settings, adapter_slot)
        self._waiting.append(request)
        return request

    def end(self, request: Request, sample: int, reason: str) -> None:
        """End a sample from outside, because of a stop string or because its client has disconnected.

        Its batch slot goes to the next request; the tokens that the device still computes are dropped.
        """
        if request.finish[sample] is None:
            request.finish[sample] = reason
        for row, sequence in enumerate(self._slots):
            if sequence is not None and sequence.request is request and sequence.sample == sample:
                self._slots[row] = None
        if request.done and request in self._waiting:
            self._waiting.remove(request)

    @property
    def free_slots(self) -> int:
        """Batch slots that no running or waiting request needs."""
        wanted = sum(request.settings.num_samples for request in self._waiting)
        return max(0, self._slots.count(None) - wanted)

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return not (self._waiting or self._started or any(self._slots))

    def run(self) -> None:
        """Step until every request is done."""
        while not self.idle:
            self.step()

    def step(self) -> list[Request]:
        """Admit requests, start a chunk, and read the results of the work before it.

        Returns:
          The requests that got tokens or ended.
        """
        self._admit()
        unread = 0
        if any(sequence is not None and sequence.left > 0 for sequence in self._slots):
            self._start_chunk()
            unread = 1  # the device computes it while the host reads the one before
        while len(self._started) > unread:
            # Taken out after it has been read: if that raises, ``fail`` must know its sequences.
            for request in read_results(self._started[0], self.config.eos_ids, self.end):
                self._touched[id(request)] = request
            self._started.popleft()
        touched, self._touched = self._touched, {}
        return list(touched.values())

    def _admit(self) -> None:
        """Prefill waiting requests into free batch slots, in their order."""
        while self._waiting:
            free = [row for row, sequence in enumerate(self._slots) if sequence is None]
            first = self._waiting[0]
            if self._merges and len(free) < self.batch_slots:
                return
            # A prefill costs the same however few of its rows are used, so it waits until it can be filled.
            wanted = min(self.prefill_rows, len(self._waiting), self.batch_slots)
            if len(free) < max(wanted, first.settings.num_samples):
                return
            group = self._admitting = [self._waiting.popleft()]
            if first.settings.num_samples > 1:
                self._prefill(group, free[: first.settings.num_samples])
                continue
            while self._waiting and len(group) < min(self.prefill_rows, len(free)):
                if self._merges or not self._alike(first, self._waiting[0]):
                    break
                group.append(self._waiting.popleft())
            self._prefill(group, free[: len(group)])

    def _alike(self, one: Request, other: Request) -> bool:
        """Whether two requests can be prefilled together."""
        buckets = {bucket_of(len(request.prompt), self.cache_length) for request in (one, other)}
        return (
            len(buckets) == 1 and one.adapter_slot == other.adapter_slot and other.settings.num_samples == 1
        )

    def _prefill(self, group: list[Request], rows: list[int]) -> None:
        """Prefill some requests, or one of several samples, and put them into batch slots."""
        first = group[0]
        sequences = [
            RunningSample(request, sample, request.settings.max_new_tokens - 1)
            for request in group
            for sample in range(request.settings.num_samples)
        ]
        several = len(sequences) > len(group)
        count = len(sequences) if several else self.prefill_rows
        # Slots beyond the batch are dropped, so that a group that is not full has its program's shape.
        places = np.array([*rows, *range(self.batch_slots, self.batch_slots + count - len(rows))], np.int32)
        padded = sequences + [sequences[0]] * (count - len(sequences))
        sampler = self._sampler(
            [sequence.request.settings for sequence in padded],
            [sequence.sample for sequence in padded],
            [sequence.request.prompt for sequence in padded],
        )
        bucket = bucket_of(len(first.prompt), self.cache_length)
        prompts = [request.prompt for request in group]
        batch = self._place(collate_prompts(prompts, bucket, 0, rows=self.prefill_rows))
        slot, length = np.int32(first.adapter_slot), self._prefix + self.cache_length
        prefilled, route = prefill(self._base, self.adapters, slot, batch, self.config, length, self._layout)
        wanted = any(request.settings.prompt_logprobs for request in group)
        scores = prompt_logprobs(self._base, self.config, prefilled.hidden, batch.tokens) if wanted else None
        prefilled = dataclasses.replace(prefilled, hidden=None)
        if several:
            prefilled = jax.tree.map(lambda leaf: leaf[:1], prefilled)
        plan = self._plan([request.settings for request in group])
        self._state, choice = admit(
            self._state, prefilled, places, np.full(count, slot), sampler, plan, self._layout
        )
        if self._gathered is not None and self.adapters is not None:
            self._gathered = gather_adapter(self._gathered, self.adapters, places, slot)
        for row, sequence in zip(rows, sequences, strict=True):
            wanted = sequence.request.finish[sequence.sample] is None  # or it was ended while it waited
            self._slots[row] = sequence if wanted and self._stays(sequence) else None
        if self._merges and self.adapters is not None:
            adapter = self.adapters.of_slot(jnp.asarray(slot))
            chosen = None if route is None else np.asarray(route.weights[:, 0, 0])
            self._merged = merged_base(self._base, adapter, chosen)
        nobody = (None,) * (count - len(sequences))
        weights = None if route is None else route.weights[:, :, 0]
        if weights is not None and several:
            weights = weights[:, :1].repeat(count, axis=1)
        choices = jax.tree.map(lambda leaf: leaf[None], choice)
        self._started.append(
            StartedWork((*sequences, *nobody), choices, np.zeros((1, count), bool), weights, scores)
        )
        self._admitting = []

    def _start_chunk(self) -> None:
        running = [sequence for sequence in self._slots if sequence is not None]
        plan = self._plan([sequence.request.settings for sequence in running])
        adapters = self.adapters if self._gathered is None else self._gathered
        weights = (self._base, adapters) if self._merged is None else (self._merged, None)
        self._state, choices, ended = decode_chunk(
            *weights, self._state, self.config, self.chunk, plan, self._layout
        )
        self._started.append(StartedWork(tuple(self._slots), choices, ended))
        for row, sequence in enumerate(self._slots):
            if sequence is not None:
                sequence.left -= self.chunk
                self._slots[row] = sequence if self._stays(sequence) else None

    def _stays(self, sequence: RunningSample) -> bool:
        """Whether a sequence needs its batch slot for longer than what has been started for it.

        The slot of a sequence whose last token is being computed goes to the next request at once, before the
        token is read, since the device runs its work in order. Only a merged base serves one request to its
        end.
        """
        return sequence.left > 0 or self._merges

    def _plan(self, settings: Sequence[GenerationSettings]) -> Plan:
        least = Plan.of(settings)
        return next((plan for plan in self._plans if plan.covers(least)), least)

    def _sampler(
        self,
        settings: Sequence[GenerationSettings],
        samples: Sequence[int],
        prompts: Sequence[Sequence[int]],
    ) -> Sampler:
        config = self.config
        return make_sampler(settings, samples, prompts, config.eos_ids, config.vocab_size, self._penalties)
