"""One prompt on its way through an engine."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from milora_jax.errors import require
from milora_jax.generation.settings import GenerationSettings
from milora_jax.model_config import ModelConfig


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of one token, before bias, penalties and temperature.

    Attributes:
      logprob: of the token.
      top: ``(token, log-probability)`` of the most probable ones, falling.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False)
class Request:
    """One prompt on its way through the engine.

    Attributes:
      prompt: token ids.
      settings: how it is continued.
      adapter_slot: of its adapter in the bank.
      tokens: per sample what was produced so far.
      logprobs: per sample and token, where asked for.
      finish: per sample why it ended: "stop" (an end-of-sequence or stop token, or the caller said so),
        "length", "cancelled", "error" (a logit was not finite, or the device failed); None while it goes on.
      prompt_logprobs: of every token of the prompt but the first, where asked for, once it was prefilled.
      route: routing weights ``[L, E]`` of the prompt, once it was prefilled; None without a router.
    """

    prompt: tuple[int, ...]
    settings: GenerationSettings
    adapter_slot: int = 0
    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[list[TokenLogprobs]] = field(default_factory=list)
    finish: list[str | None] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    route: np.ndarray | None = None

    def __post_init__(self) -> None:
        samples = range(self.settings.num_samples)
        self.tokens = [[] for _ in samples]
        self.logprobs = [[] for _ in samples]
        self.finish = [None for _ in samples]

    @property
    def done(self) -> bool:
        """Whether every sample has ended."""
        return None not in self.finish


def require_served(config: ModelConfig, settings: GenerationSettings, rows: int) -> None:
    """Refuse settings that no batch of ``rows`` rows of this model can serve, whatever the prompt.

    Raises:
      UserError: naming the setting.
    """
    wrong = [token for token in settings.stop_token_ids if token >= config.vocab_size]
    require(not wrong, "stop_token_ids", wrong[:1], f"0 to {config.vocab_size - 1}")
    wrong = [token for token, _ in settings.logit_bias if token >= config.vocab_size]
    require(not wrong, "logit_bias of a token", wrong[:1], f"0 to {config.vocab_size - 1}")
    samples = settings.num_samples
    require(samples <= rows, "num_samples", samples, f"at most the batch's {rows} rows")
