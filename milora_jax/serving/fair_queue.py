"""Fair queuing: deficit round robin over tenants, weighted by tokens (Shreedhar and Varghese, SIGCOMM 1995).

In each round every tenant may spend the same number of tokens: one that sends ten thousand requests waits
behind its own, and a single request of another is served after at most one request of each other tenant.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")

QUANTUM = 512
"""Tokens that a tenant may spend in a round: about one request, so that rounds are short."""


@dataclass(eq=False)
class _TenantQueue(Generic[Item]):
    """The items of one tenant.

    Attributes:
      waiting: costs and items.
      deficit: tokens that the tenant may spend now.
      credited: whether it has got its quantum in this round.
    """

    waiting: deque[tuple[int, Item]]
    deficit: int = 0
    credited: bool = False


class FairQueue(Generic[Item]):
    """A queue of the items of several tenants, first in, first out within each."""

    def __init__(self, quantum: int = QUANTUM) -> None:
        self._quantum = quantum
        self._tenants: OrderedDict[str, _TenantQueue[Item]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(queue.waiting) for queue in self._tenants.values())

    def push(self, tenant: str, cost: int, item: Item) -> None:
        """Add an item.

        Args:
          cost: tokens, at least 1.
        """
        self._tenants.setdefault(tenant, _TenantQueue(deque())).waiting.append((max(1, cost), item))

    def remove(self, tenant: str, item: Item) -> bool:
        """Remove an item from any position; False if it is not queued."""
        queue = self._tenants.get(tenant)
        for i, (_, found) in enumerate(queue.waiting if queue else ()):
            if queue is not None and found is item:
                del queue.waiting[i]
                self._drop_if_empty(tenant)
                return True
        return False

    def pop(self, ready: Callable[[Item], bool] = lambda item: True) -> Item | None:
        """Remove and return the next item that can be served.

        Args:
          ready: whether an item can be served; the first such item of a tenant is taken, so that one that
            waits for its adapter does not block the others.

        Returns:
          None if no item is ready.
        """
        candidates = {tenant: self._first(queue, ready) for tenant, queue in self._tenants.items()}
        if all(position is None for position in candidates.values()):
            return None
        while True:
            tenant, queue = next(iter(self._tenants.items()))
            position = candidates[tenant]
            if position is not None:
                if not queue.credited:
                    queue.deficit += self._quantum
                    queue.credited = True
                cost, item = queue.waiting[position]
                if cost <= queue.deficit:
                    queue.deficit -= cost
                    del queue.waiting[position]
                    self._drop_if_empty(tenant)
                    return item
            queue.credited = False
            self._tenants.move_to_end(tenant)

    def drain(self) -> list[Item]:
        """Remove all items."""
        items = [item for queue in self._tenants.values() for _, item in queue.waiting]
        self._tenants.clear()
        return items

    @staticmethod
    def _first(queue: _TenantQueue[Item], ready: Callable[[Item], bool]) -> int | None:
        return next((i for i, (_, item) in enumerate(queue.waiting) if ready(item)), None)

    def _drop_if_empty(self, tenant: str) -> None:
        # An idle tenant accumulates no deficit.
        if not self._tenants[tenant].waiting:
            del self._tenants[tenant]
