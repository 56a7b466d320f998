"""Requests in the device loop, and their stream events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from milora_jax.generation.constraint import Constraint
from milora_jax.generation.request import Request, TokenLogprobs
from milora_jax.generation.settings import GenerationSettings
from milora_jax.serving.store import AdapterVersion


@dataclass(frozen=True)
class StreamEvent:
    """New tokens of one sample of a job, or its end.

    Attributes:
      tokens: since the previous event.
      logprobs: those of these tokens, if the request wants them.
      finish: why the sample ended, as in ``generation.request.Request.finish``; None while it continues.
      route: routing weights ``[L, E]`` of the prompt, with the first event.
      cached_tokens: prompt tokens that came from the prefix cache.
      failure: why a constraint cannot be followed, with the finish "constraint".
      prompt_logprobs: those of the prompt's tokens but the first, if requested, with the first event.
    """

    sample: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish: str | None
    route: np.ndarray | None = None
    cached_tokens: int = 0
    failure: str = ""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(eq=False)
class Job:
    """A request in the queue or in the batch.

    Attributes:
      tenant: name of the tenant, for fair queuing.
      adapter: the adapter that it uses; None for the base alone.
      on_event: called with each stream event; must not block.
      route_tokens: leading tokens of the prompt that the routers read; 0 for all.
      cache_scope: scope in the prefix cache; None does not use the cache.
      constraint: constraint of the tokens of each sample.
      request: the engine's, once the job has started.
      sent: tokens of each sample that were in events.
      ended: which samples have ended.
      has_slot: whether it uses the slot of its adapter.
      released: whether its adapter has been released.
      started_before: how many jobs the loop had started when this one was queued.
    """

    tenant: str
    adapter: AdapterVersion | None
    prompt: tuple[int, ...]
    settings: GenerationSettings
    on_event: Callable[[StreamEvent], object]
    route_tokens: int = 0
    cache_scope: str | None = None
    constraint: Constraint | None = None
    request: Request | None = None
    sent: list[int] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)
    has_slot: bool = False
    released: bool = False
    started_before: int = 0

    def __post_init__(self) -> None:
        self.sent = [0] * self.settings.num_samples
        self.ended = [False] * self.settings.num_samples

    @property
    def cost(self) -> int:
        """Most tokens of prompt and samples."""
        return len(self.prompt) + self.settings.max_new_tokens * self.settings.num_samples
