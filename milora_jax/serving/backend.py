"""The interface that the HTTP API calls: a service of this process, or replicas in others."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from milora_jax.generation.request import TokenLogprobs
from milora_jax.serving.admission import AdmissionControl
from milora_jax.serving.keys import Tenant
from milora_jax.serving.limits import Limits
from milora_jax.serving.metrics import Metrics
from milora_jax.serving.registry import Registered
from milora_jax.serving.requests import ChatRequest, CompletionRequest
from milora_jax.serving.responses import FinishReason
from milora_jax.serving.tokenization import DetokenizeRequest, Tokenized, TokenizeRequest
from milora_jax.serving.tools import Call

GenerationBody = CompletionRequest | ChatRequest


@dataclass(frozen=True)
class Delta:
    """The new output of one sample.

    Attributes:
      sample: its number in the request: those of the first prompt come first.
      text: text that can be shown.
      tokens, logprobs: since the previous delta; a stop token included.
      finish: "stop", "length" or "tool_calls" with the last delta.
      route: route of the prompt, with the first delta.
      cached_tokens: prompt tokens that came from the prefix cache.
      calls: tool calls that were completed since the previous delta.
      prompt_logprobs: those of the prompt's tokens but the first, if they are wanted, with the first delta.
    """

    sample: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish: FinishReason | None
    route: np.ndarray | None = None
    cached_tokens: int = 0
    calls: tuple[Call, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class Generation:
    """A request that has been queued.

    Attributes:
      model: the name in the request.
      prompts: token ids of the prompts.
      deltas: deltas of all samples, to be read to the end.
    """

    id: str
    model: str
    prompts: tuple[tuple[int, ...], ...]
    deltas: AsyncIterator[Delta]
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def prompt_tokens(self) -> int:
        """Length of all prompts together."""
        return sum(map(len, self.prompts))


@runtime_checkable
class Backend(Protocol):
    """The interface that the HTTP API calls: a :class:`Service` of this process, or replicas in others.

    Attributes:
      admission: admission control of this process.
      metrics: where requests are counted in this process.
    """

    limits: Limits
    admission: AdmissionControl
    metrics: Metrics

    def models(self, tenant: Tenant) -> list[str]:
        """Return the names of the models that a tenant may use."""
        ...

    def generate(self, tenant: Tenant, body: GenerationBody) -> AbstractAsyncContextManager[Generation]:
        """Queue an admitted request; leaving the context ends its samples that still run.

        Raises:
          APIError: the request is refused.
        """
        ...

    def token_text(self, token: int) -> str:
        """Return the text of one token."""
        ...

    def text_of(self, tokens: Sequence[int]) -> str:
        """Return the text of several tokens, including special ones."""
        ...

    async def tokenize(self, tenant: Tenant, body: TokenizeRequest) -> Tokenized:
        """Return the token ids of a prompt, as a generation would get it.

        Raises:
          APIError: the request is refused.
        """
        ...

    async def detokenize(self, tenant: Tenant, body: DetokenizeRequest) -> str:
        """Return the text of token ids.

        Raises:
          APIError: the request is refused.
        """
        ...

    async def load(self, name: str, registered: Registered) -> None:
        """Load an adapter.

        Raises:
          UserError, OSError: it cannot be loaded; what was loaded before stays loaded.
        """
        ...

    async def unload(self, name: str) -> bool:
        """Unload an adapter; return False if no adapter of that name is loaded."""
        ...

    async def health(self) -> tuple[bool, int]:
        """Return whether requests can be served, and the number of free batch slots."""
        ...

    async def metrics_text(self) -> bytes:
        """Return all counters in the format of Prometheus."""
        ...
