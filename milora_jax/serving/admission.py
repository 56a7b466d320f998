"""Admission control: requests are counted before their bodies are read, so that a refusal costs nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from milora_jax.serving.api_errors import overloaded, rate_limited
from milora_jax.serving.keys import Tenant
from milora_jax.serving.limits import Limits

WRONG_KEYS_PER_SECOND = 10
"""Wrong keys per second that an address may send; a person mistypes more slowly."""

MAX_ADDRESSES = 4096

SHARE = 4
"""Units, of requests or of queued tokens, that a tenant may have for each one that is still free: one that
floods the server leaves a fifth of them to others, two leave a ninth (the dynamic thresholds of Choudhury and
Hahne, IEEE/ACM ToN 1998)."""

BUSY = "Too many of one key at a time while the server is busy: the rest is left to others"


@dataclass
class TokenBucket:
    """A token bucket.

    Attributes:
      rate: units that are added in a second.
      size: units that it holds, and starts with.
    """

    rate: float
    size: float
    clock: Callable[[], float] = time.monotonic
    left: float = field(init=False)
    updated: float = field(init=False)

    def __post_init__(self) -> None:
        self.left, self.updated = self.size, self.clock()

    def take(self, count: int) -> bool:
        """Take units if enough are left; a full bucket gives more than it holds."""
        now = self.clock()
        self.left = min(self.size, self.left + (now - self.updated) * self.rate)
        self.updated = now
        if self.left < min(count, self.size):
            return False
        self.left -= count
        return True


@dataclass
class _TenantUsage:
    active_requests: int = 0
    queued_tokens: int = 0
    bucket: TokenBucket | None = None


class AdmissionControl:
    """The limits of the server and of each tenant. Only the thread of the event loop uses it.

    Attributes:
      active_requests: requests that were admitted and have not ended.
      queued_tokens: tokens of the prompts that wait for a batch slot.
      closed: whether the server is stopping, and admits no request.
      wrong_keys: token buckets by address.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._usage: dict[str, _TenantUsage] = {}
        self.wrong_keys: dict[str, TokenBucket] = {}
        self.active_requests = 0
        self.queued_tokens = 0
        self.closed = False

    @contextmanager
    def admit(self, tenant: Tenant) -> Iterator[None]:
        """Count a request for as long as it is active.

        Raises:
          APIError: the tenant or the server has too many, or the server is stopping.
        """
        usage = self._usage.setdefault(tenant.name, _TenantUsage())
        if self.closed:
            raise overloaded("The server is stopping.")
        if 0 < tenant.concurrency <= usage.active_requests:
            raise rate_limited(f"Too many requests at a time: this key has concurrency {tenant.concurrency}.")
        limits = self._limits
        free = limits.queue + limits.rows - self.active_requests
        if free <= 0:
            raise overloaded(f"The server is full: --rows {limits.rows} decode, --queue {limits.queue} wait.")
        if not tenant.alone and usage.active_requests >= SHARE * free:
            raise rate_limited(f"{BUSY} (--queue {limits.queue}).")
        usage.active_requests += 1
        self.active_requests += 1
        try:
            yield
        finally:
            usage.active_requests -= 1
            self.active_requests -= 1

    @contextmanager
    def queue_prompt(self, tenant: Tenant, tokens: int) -> Iterator[None]:
        """Count the tokens of a prompt for as long as it is queued.

        Raises:
          APIError: the tenant or the server has too many.
        """
        usage = self._usage.setdefault(tenant.name, _TenantUsage())
        free = self._limits.queue_tokens - self.queued_tokens
        flag = f"--queue-tokens {self._limits.queue_tokens}"
        if self.queued_tokens and tokens > free:
            raise overloaded(f"The server is full: prompts of at most {flag} wait.")
        shares = not tenant.alone and usage.queued_tokens > 0
        if shares and usage.queued_tokens + tokens > SHARE * free:
            raise rate_limited(f"{BUSY} ({flag}).")
        usage.queued_tokens += tokens
        self.queued_tokens += tokens
        try:
            yield
        finally:
            usage.queued_tokens -= tokens
            self.queued_tokens -= tokens

    def spend_tokens(self, tenant: Tenant, tokens: int) -> None:
        """Take the tokens of a request from the tenant's budget for a minute.

        Raises:
          APIError: the budget is used up.
        """
        if not tenant.tokens_per_minute:
            return
        usage = self._usage.setdefault(tenant.name, _TenantUsage())
        if usage.bucket is None:
            per_minute = tenant.tokens_per_minute
            usage.bucket = TokenBucket(per_minute / 60, per_minute, self._clock)
        if not usage.bucket.take(tokens):
            raise rate_limited(f"Too many tokens: this key has tokens_per_minute {tenant.tokens_per_minute}.")

    def count_wrong_key(self, address: str) -> None:
        """Count a wrong key.

        Raises:
          APIError: the address has sent too many.
        """
        if address not in self.wrong_keys and len(self.wrong_keys) >= MAX_ADDRESSES:
            self.wrong_keys.pop(next(iter(self.wrong_keys)))
        bucket = self.wrong_keys.setdefault(
            address, TokenBucket(WRONG_KEYS_PER_SECOND, WRONG_KEYS_PER_SECOND, self._clock)
        )
        if not bucket.take(1):
            raise rate_limited("Too many wrong keys.")
