"""Prompts in, tokens out, many at a time: rows are filled as they become free.

An :class:`Engine` owns one running batch of a fixed number of rows. ``submit`` queues a request;
``step`` admits what fits, starts the next chunk of decode steps and hands out the tokens of the one
before, so that the device computes a chunk while the host looks at the last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from milora_jax.adapters.tenants import Seats, Tenants, take_seats
from milora_jax.base.attention import Spread, spread_over
from milora_jax.base.modules import Base
from milora_jax.data.batches import collate_prompts
from milora_jax.errors import UserError, require
from milora_jax.generation.decode import admit, decode_chunk, empty_state, places_of, prefill
from milora_jax.generation.merge import merged_base
from milora_jax.generation.request import Request, TokenLogprobs, require_served
from milora_jax.generation.sampling import Choice, Plan, Sampler, make_sampler
from milora_jax.generation.settings import GenerationSettings
from milora_jax.model_config import ModelConfig
from milora_jax.types import Batch

CHUNK = 16
"""Decode steps between two looks at who has ended."""

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


@dataclass(eq=False)
class _Seat:
    """Who sits in a row.

    Attributes:
      left: tokens that are still to be computed for the sample, by its length alone.
    """

    request: Request
    sample: int
    left: int


@dataclass(frozen=True)
class _Started:
    """Work on the device whose results nobody has looked at yet.

    Attributes:
      seats: who sat where when it was started.
      choices: leaves ``[steps, B, ...]``.
      ended: rows that had ended before each step, ``[steps, B]``.
      route: of the prompts that were prefilled, ``[L, B, E]``.
    """

    seats: tuple[_Seat | None, ...]
    choices: Choice
    ended: Any
    route: Any = None


class Engine:
    """A running batch.

    Args:
      base: in the decode layout.
      tenants: the adapters; None decodes the plain base.
      rows: B, continuations decoded together.
      slots: S, the longest prompt and continuation together; 0 is the model's positions.
      chunk: decode steps between two looks at who has ended.
      penalties: whether requests may have penalties, which cost two bits of memory per row and word.
      prefill_rows: prompts of one length bucket and one tenant that are prefilled together.
      merge: continue one prompt at a time, with its adapter folded into a copy of the weights.
      plans: of which the first that does all that is asked is compiled; none makes one for every mixture of
        requests, as small as can be.
      place: puts a prefill batch on the devices.
      spread: how rows and heads lie over several devices; None lets XLA decide.

    Attributes:
      tenants: to be set again after a bank has loaded an adapter, whose old buffers are gone then.
    """

    def __init__(
        self,
        base: Base,
        config: ModelConfig,
        tenants: Tenants | None = None,
        *,
        rows: int = 8,
        slots: int = 0,
        chunk: int = CHUNK,
        penalties: bool = True,
        prefill_rows: int = 1,
        merge: bool = False,
        plans: Sequence[Plan] = (),
        place: Callable[[Batch], Batch] = jax.device_put,
        spread: Spread | None = None,
    ) -> None:
        require(rows >= 1, "rows", rows, "at least 1")
        slots = slots or config.max_positions
        fits = 2 <= slots <= config.max_positions
        require(fits, "slots", slots, f"2 to the model's {config.max_positions} positions")
        require(chunk >= 1, "chunk", chunk, "at least 1")
        require(prefill_rows >= 1, "prefill_rows", prefill_rows, "at least 1")
        self.config, self.rows, self.slots, self.chunk = config, rows, slots, chunk
        self.tenants, self.prefill_rows = tenants, prefill_rows
        self._base, self._place, self._penalties, self._plans = base, place, penalties, tuple(plans)
        self._spread = spread or spread_over(base.devices)
        self._merges = merge and tenants is not None
        self._merged: Base | None = None
        prefix = 0 if tenants is None else tenants.method.prefix_length
        self._cache_slots = prefix + slots
        self._waiting: deque[Request] = deque()
        self._clear()

    def _clear(self) -> None:
        """A batch in which nobody sits."""
        self._admitting: list[Request] = []
        self._touched: dict[int, Request] = {}
        self._seats: list[_Seat | None] = [None] * self.rows
        self._started: deque[_Started] = deque()
        self._mine: Seats | None = None
        if self.tenants is not None and self.tenants.path == "gathered":
            self._mine = Seats.empty(self.tenants, self.rows)
        routed = self.tenants is not None and self.tenants.method.routes
        sampler = self._sampler([GenerationSettings()], [0], [()])
        state = empty_state(self.config, self._base, sampler, self.rows, self._cache_slots, routed)
        places = places_of(state, self._spread)
        self._state = state if places is None else jax.device_put(state, places)

    def fail(self) -> list[Request]:
        """End all that was begun, after a step raised: what is on the device may be half-written.

        Returns:
          The requests that ended, and those that had got tokens before it raised; those that wait are kept.
        """
        begun = [seat for seats in (self._seats, *(work.seats for work in self._started)) for seat in seats]
        failed = {id(seat.request): seat.request for seat in begun if seat is not None}
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
        require_served(self.config, settings, self.rows)
        require(settings.num_beams == 1, "num_beams", settings.num_beams, "1, beams run by themselves")
        if settings.penalized and not self._penalties:
            raise UserError("a penalty was asked for, but this engine was made without penalties")
        if len(prompt) + settings.max_new_tokens > self.slots:
            raise UserError(
                f"the prompt has {len(prompt)} tokens and may get {settings.max_new_tokens} new ones: "
                f"expected at most {self.slots} together"
            )

    def submit(self, prompt: Sequence[int], settings: GenerationSettings, slot: int = 0) -> Request:
        """Queue a prompt.

        Args:
          slot: of its adapter in the bank.

        Raises:
          UserError: for a prompt or settings that cannot be decoded here; nothing is queued then.
        """
        self.check(prompt, settings)
        request = Request(tuple(int(token) for token in prompt), settings, slot)
        self._waiting.append(request)
        return request

    def end(self, request: Request, sample: int, reason: str) -> None:
        """End a sample from outside: its stop string came, or nobody wants it any more.

        Its row goes to the next request; until then the device goes on with it and nobody looks.
        """
        if request.finish[sample] is None:
            request.finish[sample] = reason
        for row, seat in enumerate(self._seats):
            if seat is not None and seat.request is request and seat.sample == sample:
                self._seats[row] = None
        if request.done and request in self._waiting:
            self._waiting.remove(request)

    @property
    def free_rows(self) -> int:
        """Rows that nobody has or waits for."""
        wanted = sum(request.settings.num_samples for request in self._waiting)
        return max(0, self._seats.count(None) - wanted)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do and nothing to look at."""
        return not (self._waiting or self._started or any(self._seats))

    def run(self) -> None:
        """Go on until every request is done."""
        while not self.idle:
            self.step()

    def step(self) -> list[Request]:
        """Admit, start a chunk, and look at what was started before it.

        Returns:
          The requests that got tokens or ended.
        """
        self._admit()
        unlooked = 0
        if any(seat is not None and seat.left > 0 for seat in self._seats):
            self._start_chunk()
            unlooked = 1  # the device computes it while the host looks at the one before
        while len(self._started) > unlooked:
            # Taken out when it has been looked at: if that raises, ``fail`` must know who was there.
            for request in self._look(self._started[0]):
                self._touched[id(request)] = request
            self._started.popleft()
        touched, self._touched = self._touched, {}
        return list(touched.values())

    def _admit(self) -> None:
        """Prefill waiting requests into free rows, in their order."""
        while self._waiting:
            free = [row for row, seat in enumerate(self._seats) if seat is None]
            first = self._waiting[0]
            if self._merges and len(free) < self.rows:
                return
            # A prefill costs the same however few of its rows are used: wait until it can be filled.
            wanted = min(self.prefill_rows, len(self._waiting), self.rows)
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
        buckets = {bucket_of(len(request.prompt), self.slots) for request in (one, other)}
        return len(buckets) == 1 and one.slot == other.slot and other.settings.num_samples == 1

    def _prefill(self, group: list[Request], rows: list[int]) -> None:
        """Seat some requests, or the samples of one; until they sit they are being admitted."""
        first = group[0]
        seats = [
            _Seat(request, sample, request.settings.max_new_tokens - 1)
            for request in group
            for sample in range(request.settings.num_samples)
        ]
        spread = len(seats) > len(group)
        count = len(seats) if spread else self.prefill_rows
        # Rows beyond the batch are dropped: a group that is not full still has its program's shape.
        places = np.array([*rows, *range(self.rows, self.rows + count - len(rows))], np.int32)
        padded = seats + [seats[0]] * (count - len(seats))
        sampler = self._sampler(
            [seat.request.settings for seat in padded],
            [seat.sample for seat in padded],
            [seat.request.prompt for seat in padded],
        )
        bucket = bucket_of(len(first.prompt), self.slots)
        prompts = [request.prompt for request in group]
        batch = self._place(collate_prompts(prompts, bucket, 0, rows=self.prefill_rows))
        slot = np.int32(first.slot)
        prefilled, route = prefill(
            self._base, self.tenants, slot, batch, self.config, self._cache_slots, self._spread
        )
        if spread:
            prefilled = jax.tree.map(lambda leaf: leaf[:1], prefilled)
        tenant = np.full(count, first.slot, np.int32)
        plan = self._plan([request.settings for request in group])
        self._state, choice = admit(self._state, prefilled, places, tenant, sampler, plan, self._spread)
        if self._mine is not None and self.tenants is not None:
            self._mine = take_seats(self._mine, self.tenants, places, slot)
        for row, seat in zip(rows, seats, strict=True):
            wanted = seat.request.finish[seat.sample] is None  # or it was ended while it waited
            self._seats[row] = seat if wanted and self._stays(seat) else None
        if self._merges and self.tenants is not None:
            adapter = self.tenants.of_slot(jnp.asarray(slot))
            chosen = None if route is None else np.asarray(route.weights[:, 0, 0])
            self._merged = merged_base(self._base, adapter, chosen)
        nobody = (None,) * (count - len(seats))
        weights = None if route is None else route.weights[:, :, 0]
        if weights is not None and spread:
            weights = weights[:, :1].repeat(count, axis=1)
        choices = jax.tree.map(lambda leaf: leaf[None], choice)
        self._started.append(_Started((*seats, *nobody), choices, np.zeros((1, count), bool), weights))
        self._admitting = []

    def _start_chunk(self) -> None:
        seated = [seat for seat in self._seats if seat is not None]
        plan = self._plan([seat.request.settings for seat in seated])
        tenants = self.tenants if self._mine is None else self._mine
        weights = (self._base, tenants) if self._merged is None else (self._merged, None)
        self._state, choices, ended = decode_chunk(
            *weights, self._state, self.config, self.chunk, plan, self._spread
        )
        self._started.append(_Started(tuple(self._seats), choices, ended))
        for row, seat in enumerate(self._seats):
            if seat is not None:
                seat.left -= self.chunk
                self._seats[row] = seat if self._stays(seat) else None

    def _stays(self, seat: _Seat) -> bool:
        """Whether a row is needed for longer than what has been started for it.

        One whose last token is being computed goes to the next request now, without anybody having looked:
        the device does one thing after the other. Only a merged base serves one request to its end.
        """
        return seat.left > 0 or self._merges

    def _look(self, started: _Started) -> list[Request]:
        """Hand out the tokens of finished work, and free the rows of those who ended."""
        choices, ended, route = jax.device_get((started.choices, started.ended, started.route))
        touched = []
        for row, seat in enumerate(started.seats):
            if seat is None or seat.request.finish[seat.sample] is not None:
                continue
            request = seat.request
            if route is not None:
                request.route = route[:, row]
            for step in range(len(ended)):
                if ended[step, row]:
                    break
                self._hand_out(request, seat.sample, choices, step, row)
                if request.finish[seat.sample] == "error":
                    break
            touched.append(request)
        return touched

    def _hand_out(self, request: Request, sample: int, choices: Choice, step: int, row: int) -> None:
        """One token, and whether the sample ends with it."""
        if not choices.finite[step, row]:
            self.end(request, sample, "error")
            return
        settings, token = request.settings, int(choices.token[step, row])
        request.tokens[sample].append(token)
        top_tokens, top_logprobs = choices.top_tokens, choices.top_logprobs
        if settings.logprobs and not (choices.logprob is None or top_tokens is None or top_logprobs is None):
            pairs = zip(top_tokens[step, row], top_logprobs[step, row], strict=True)
            top = tuple((int(i), float(value)) for i, value in pairs)[: settings.logprobs]
            request.logprobs[sample].append(TokenLogprobs(float(choices.logprob[step, row]), top))
        ends = () if settings.ignore_eos else self.config.eos_ids
        if token in settings.stop_token_ids or token in ends:
            self.end(request, sample, "stop")
        elif len(request.tokens[sample]) >= settings.max_new_tokens:
            self.end(request, sample, "length")

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
