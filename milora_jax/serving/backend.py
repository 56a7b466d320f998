"""What the HTTP API calls, and what it is given: a service of this process, or replicas in others."""

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
    """What one sample has gained.

    Attributes:
      sample: its number in the request: those of the first prompt come first.
      text: that can be shown.
      tokens, logprobs: since the previous delta; a stop token included.
      finish: "stop", "length" or "tool_calls" with the last delta.
      route: of the prompt, with the first delta.
      cached_tokens: prompt tokens that came from the prefix cache.
      calls: of tools, that are whole since the previous delta.
      prompt_logprobs: of the prompt's tokens but the first, if they are wanted, with the first delta.
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
      deltas: of all samples, to be read to the end.
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
    """What the HTTP API calls: a :class:`Service` of this process, or replicas in others.

    Attributes:
      admission: admission control of this process.
      metrics: where requests are counted in this process.
    """

    limits: Limits
    admission: AdmissionControl
    metrics: Metrics

    def models(self, tenant: Tenant) -> list[str]:
        """Names of the models that a tenant may use."""
        ...

    def generate(self, tenant: Tenant, body: GenerationBody) -> AbstractAsyncContextManager[Generation]:
        """Queue an admitted request; leaving the context ends what still runs of it.

        Raises:
          APIError: the request is refused.
        """
        ...

    def token_text(self, token: int) -> str:
        """The text of one token."""
        ...

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of several tokens, special ones among them."""
        ...

    async def tokenize(self, tenant: Tenant, body: TokenizeRequest) -> Tokenized:
        """Token ids of a prompt, as a generation would get it.

        Raises:
          APIError: the request is refused.
        """
        ...

    async def detokenize(self, tenant: Tenant, body: DetokenizeRequest) -> str:
        """The text of token ids.

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
        """Unload an adapter; False if none of that name is loaded."""
        ...

    async def health(self) -> tuple[bool, int]:
        """Whether requests can be served, and the number of free batch slots."""
        ...

    async def metrics_text(self) -> bytes:
        """All counters in the format of Prometheus."""
        ...
