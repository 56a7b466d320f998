"""A request: one prompt and its samples in an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from milora_jax.errors import UserError, require
from milora_jax.generation.constraint import Constraint
from milora_jax.generation.settings import GenerationSettings
from milora_jax.model_config import ModelConfig


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of one token, before bias, penalties and temperature.

    Attributes:
      logprob: log-probability of the token.
      top: ``(token, log-probability)`` of the most probable ones, falling.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False)
class Request:
    """A request: one prompt and its samples in an engine.

    Attributes:
      prompt: token ids.
      settings: settings of its continuation.
      adapter_slot: slot of its adapter in the bank.
      route_tokens: leading tokens of the prompt that the routers read; 0 for all.
      cache_scope: names what the keys and values of its prompt depend on beside its tokens, and who may share
        them, see ``generation.prefix_cache``; None for no use of the cache.
      tokens: per sample what was produced so far.
      logprobs: per sample and token, where asked for.
      finish: per sample why it ended: "stop" (an end-of-sequence or stop token, or the caller said so),
        "length", "cancelled", "error" (a logit was not finite, or the device failed), "constraint" (its
        constraint cannot be followed, see ``failure``); None while it goes on.
      prompt_logprobs: those of every prompt token but the first, where asked for, once it was prefilled.
      route: routing weights ``[L, E]`` of the prompt, once it was prefilled; None without a router.
      cached_tokens: tokens of the prompt whose keys and values came from the prefix cache.
      proposed_tokens: number of tokens that prompt look-up proposed so far, for all samples.
      accepted_tokens: number of these tokens that were accepted.
      constraint: constraint of its tokens; None for none.
      constraints: constraint of each sample, in the state of the sample; empty without one.
      failure: why a constraint cannot be followed.
    """

    prompt: tuple[int, ...]
    settings: GenerationSettings
    adapter_slot: int = 0
    route_tokens: int = 0
    cache_scope: str | None = None
    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[list[TokenLogprobs]] = field(default_factory=list)
    finish: list[str | None] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    route: np.ndarray | None = None
    cached_tokens: int = 0
    proposed_tokens: int = 0
    accepted_tokens: int = 0
    constraint: Constraint | None = None
    constraints: list[Constraint] = field(default_factory=list)
    failure: str = ""

    def __post_init__(self) -> None:
        samples = range(self.settings.num_samples)
        self.tokens = [[] for _ in samples]
        self.logprobs = [[] for _ in samples]
        self.finish = [None for _ in samples]
        self.constraints = [] if self.constraint is None else [self.constraint.copy() for _ in samples]

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


def require_decodable(
    config: ModelConfig, prompt: Sequence[int], settings: GenerationSettings, rows: int, cache_length: int
) -> None:
    """Refuse a prompt that no batch of ``rows`` rows and ``cache_length`` positions can continue.

    Raises:
      UserError: naming what is wrong with this one request.
    """
    vocab, allowed = config.vocab_size, f"0 to {config.vocab_size - 1}"
    require(len(prompt) > 0, "prompt", "empty", "at least one token")
    wrong = [token for token in prompt if not 0 <= token < vocab]
    require(not wrong, "a token id of the prompt", wrong[:1], allowed)
    require_served(config, settings, rows)
    if len(prompt) + settings.max_new_tokens > cache_length:
        raise UserError(
            f"the prompt has {len(prompt)} tokens and may get {settings.max_new_tokens} new ones: "
            f"expected at most {cache_length} together"
        )
