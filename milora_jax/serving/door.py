"""Who is let in: counted before a request is read, so that refusing costs nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from milora_jax.serving.keys import Tenant
from milora_jax.serving.limits import Limits
from milora_jax.serving.refusal import Refusal, overloaded, too_many

BAD_KEYS_PER_SECOND = 10
"""Of one address; a person mistypes slower."""

MOST_ADDRESSES = 4096

SHARE = 4
"""Places, of requests or of waiting tokens, that one tenant may have for every one that is still free: one
who floods leaves a fifth of them to others, two leave a ninth (the dynamic thresholds of Choudhury and Hahne,
IEEE/ACM ToN 1998)."""


@dataclass
class Bucket:
    """A token bucket.

    Attributes:
      rate: units that come back in a second.
      size: units that it holds, and begins with.
    """

    rate: float
    size: float
    clock: Callable[[], float] = time.monotonic
    left: float = field(init=False)
    seen: float = field(init=False)

    def __post_init__(self) -> None:
        self.left, self.seen = self.size, self.clock()

    def take(self, count: int) -> bool:
        """Take units, if as many are left; more than fit into the bucket are given when it is full."""
        now = self.clock()
        self.left = min(self.size, self.left + (now - self.seen) * self.rate)
        self.seen = now
        if self.left < min(count, self.size):
            return False
        self.left -= count
        return True


BUSY = "Too many of one key at a time while the server is busy: the rest is left to others"


@dataclass
class _Visits:
    under_way: int = 0
    waiting_tokens: int = 0
    bucket: Bucket | None = None


class Door:
    """The limits of all requests together and of each tenant. Used by the event loop's thread alone."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._visits: dict[str, _Visits] = {}
        self._mistakes: dict[str, Bucket] = {}
        self.under_way = 0
        self.waiting_tokens = 0
        self.closed = False

    @contextmanager
    def entered(self, tenant: Tenant) -> Iterator[None]:
        """For as long as a request is under way.

        Raises:
          Refusal: the tenant or the server has too many, or the server is stopping.
        """
        visits = self._visits.setdefault(tenant.name, _Visits())
        if self.closed:
            raise overloaded("The server is stopping.")
        if 0 < tenant.concurrency <= visits.under_way:
            raise too_many(f"Too many requests at a time: this key has concurrency {tenant.concurrency}.")
        limits = self._limits
        free = limits.queue + limits.rows - self.under_way
        if free <= 0:
            raise overloaded(f"The server is full: --rows {limits.rows} decode, --queue {limits.queue} wait.")
        if not tenant.alone and visits.under_way >= SHARE * free:
            raise too_many(f"{BUSY} (--queue {limits.queue}).")
        visits.under_way += 1
        self.under_way += 1
        try:
            yield
        finally:
            visits.under_way -= 1
            self.under_way -= 1

    @contextmanager
    def waiting(self, tenant: Tenant, tokens: int) -> Iterator[None]:
        """For as long as the tokens of a prompt wait.

        Raises:
          Refusal: too many wait already, of this tenant or of all.
        """
        visits = self._visits.setdefault(tenant.name, _Visits())
        free = self._limits.queue_tokens - self.waiting_tokens
        most = f"--queue-tokens {self._limits.queue_tokens}"
        if self.waiting_tokens and tokens > free:
            raise overloaded(f"The server is full: prompts of at most {most} wait.")
        shares = not tenant.alone and visits.waiting_tokens > 0
        if shares and visits.waiting_tokens + tokens > SHARE * free:
            raise too_many(f"{BUSY} ({most}).")
        visits.waiting_tokens += tokens
        self.waiting_tokens += tokens
        try:
            yield
        finally:
            visits.waiting_tokens -= tokens
            self.waiting_tokens -= tokens

    def spend(self, tenant: Tenant, tokens: int) -> None:
        """Count what a request may cost.

        Raises:
          Refusal: the tenant has used up what it may in a minute.
        """
        if not tenant.tokens_per_minute:
            return
        visits = self._visits.setdefault(tenant.name, _Visits())
        if visits.bucket is None:
            per_minute = tenant.tokens_per_minute
            visits.bucket = Bucket(per_minute / 60, per_minute, self._clock)
        if not visits.bucket.take(tokens):
            raise too_many(f"Too many tokens: this key has tokens_per_minute {tenant.tokens_per_minute}.")

    def wrong_key(self, address: str) -> Refusal | None:
        """Note a wrong key; a refusal for an address that tries too many."""
        if address not in self._mistakes and len(self._mistakes) >= MOST_ADDRESSES:
            self._mistakes.pop(next(iter(self._mistakes)))
        bucket = self._mistakes.setdefault(
            address, Bucket(BAD_KEYS_PER_SECOND, BAD_KEYS_PER_SECOND, self._clock)
        )
        return None if bucket.take(1) else too_many("Too many wrong keys.")
