"""Who is served next: deficit round robin over tenants (Shreedhar and Varghese, SIGCOMM 1995).

In every round a tenant may spend as many tokens as every other: one who sends ten thousand requests waits
behind itself, and another's single request is served after at most one request of each of the others.
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
class _Line(Generic[Item]):
    """What waits of one tenant.

    Attributes:
      deficit: tokens that it may spend now.
      served: whether it has been given its quantum in this round.
    """

    waiting: deque[tuple[int, Item]]
    deficit: int = 0
    served: bool = False


class FairQueue(Generic[Item]):
    """Items of several tenants, first in first out within each."""

    def __init__(self, quantum: int = QUANTUM) -> None:
        self._quantum = quantum
        self._lines: OrderedDict[str, _Line[Item]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(line.waiting) for line in self._lines.values())

    def push(self, tenant: str, cost: int, item: Item) -> None:
        """Add an item.

        Args:
          cost: tokens, at least 1.
        """
        self._lines.setdefault(tenant, _Line(deque())).waiting.append((max(1, cost), item))

    def remove(self, tenant: str, item: Item) -> bool:
        """Take an item out wherever it stands; False if it is not there."""
        line = self._lines.get(tenant)
        for i, (_, found) in enumerate(line.waiting if line else ()):
            if line is not None and found is item:
                del line.waiting[i]
                self._forget_empty(tenant)
                return True
        return False

    def pop(self, ready: Callable[[Item], bool] = lambda item: True) -> Item | None:
        """The next item that can be served.

        Args:
          ready: whether an item can be; a tenant's first that can is taken, so that one who waits for its
            adapter does not hold up the others.

        Returns:
          None where none can be.
        """
        candidates = {tenant: self._first(line, ready) for tenant, line in self._lines.items()}
        if all(place is None for place in candidates.values()):
            return None
        while True:
            tenant, line = next(iter(self._lines.items()))
            place = candidates[tenant]
            if place is not None:
                if not line.served:
                    line.deficit += self._quantum
                    line.served = True
                cost, item = line.waiting[place]
                if cost <= line.deficit:
                    line.deficit -= cost
                    del line.waiting[place]
                    self._forget_empty(tenant)
                    return item
            line.served = False
            self._lines.move_to_end(tenant)

    def drain(self) -> list[Item]:
        """Take all out."""
        items = [item for line in self._lines.values() for _, item in line.waiting]
        self._lines.clear()
        return items

    @staticmethod
    def _first(line: _Line[Item], ready: Callable[[Item], bool]) -> int | None:
        return next((i for i, (_, item) in enumerate(line.waiting) if ready(item)), None)

    def _forget_empty(self, tenant: str) -> None:
        # A tenant that has nothing to do saves nothing up.
        if not self._lines[tenant].waiting:
            del self._lines[tenant]
