"""The queue of requests that wait for batch slots, and the choice of those that are prefilled together."""

from __future__ import annotations

from collections import deque

from milora_jax.generation.lengths import bucket_of
from milora_jax.generation.request import Request


class WaitingRequests:
    """A first-in, first-out queue of requests.

    Args:
      batch_slots: number of batch slots of the engine.
      cache_length: cache positions of a batch slot.
      prefill_rows: prompts that are prefilled together.
      alone: whether a request is taken only when every slot is free.
    """

    def __init__(self, batch_slots: int, cache_length: int, prefill_rows: int, alone: bool) -> None:
        self._batch_slots, self._cache_length = batch_slots, cache_length
        self._prefill_rows, self._alone = prefill_rows, alone
        self._requests: deque[Request] = deque()

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def samples(self) -> int:
        """Number of batch slots that all of them need."""
        return sum(request.settings.num_samples for request in self._requests)

    def add(self, request: Request) -> None:
        """Queue a request."""
        self._requests.append(request)

    def discard(self, request: Request) -> None:
        """Remove a request, if it is queued."""
        if request in self._requests:
            self._requests.remove(request)

    def take(self, free: int) -> list[Request]:
        """Remove and return the next requests to be prefilled together; none if they do not fit.

        Args:
          free: number of free batch slots.
        """
        if not self._requests or (self._alone and free < self._batch_slots):
            return []
        first = self._requests[0]
        # A prefill costs the same however few of its rows are used, so it waits until it can be filled.
        wanted = min(self._prefill_rows, len(self._requests), self._batch_slots)
        if free < max(wanted, first.settings.num_samples):
            return []
        group = [self._requests.popleft()]
        if first.settings.num_samples > 1 or self._alone:
            return group
        while self._requests and len(group) < min(self._prefill_rows, free):
            if not self._alike(first, self._requests[0]):
                break
            group.append(self._requests.popleft())
        return group

    def _alike(self, one: Request, other: Request) -> bool:
        """Whether two requests can be prefilled together."""
        buckets = {bucket_of(len(request.prompt), self._cache_length) for request in (one, other)}
        return (
            len(buckets) == 1 and one.adapter_slot == other.adapter_slot and other.settings.num_samples == 1
        )
