"""The settings that a caller may give for one generation, checked before any of them reaches a device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from milora_jax.errors import require

MOST_STOPS = 16
"""Most stop strings, and most stop tokens, of one request; each is searched for after every token."""

MOST_LOGPROBS = 20
MOST_BIASES = 300
MOST_SAMPLES = 128
LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class GenerationSettings:
    """How one prompt is continued. The defaults are greedy decoding.

    Names and meaning are those of Hugging Face's ``GenerationConfig`` and of vLLM's ``SamplingParams``.
    The steps are taken in this order: bias, penalties, temperature, top-k, top-p, min-p.

    Attributes:
      max_new_tokens: longest continuation in tokens, the end-of-sequence token included; 0 with
        ``prompt_logprobs``, which then are all that is wanted.
      temperature: what logits are divided by; 0 is greedy.
      top_k: keep the k most probable tokens; 0 keeps all.
      top_p: keep the smallest set of most probable tokens that holds this probability.
      min_p: keep tokens at least this fraction as probable as the most probable one.
      repetition_penalty: divides positive and multiplies negative logits of tokens seen in the prompt or
        the continuation; 1 is off (arXiv 1909.05858, section 4.1).
      presence_penalty: taken from the logits of tokens seen in the continuation; 0 is off.
      frequency_penalty: taken from a token's logit for each time that the continuation holds it; 0 is off.
      logit_bias: ``(token, number)`` pairs; the number is added to the token's logit.
      seed: of this request's random numbers: they depend on it and on nothing else in the batch.
      stop: strings that end the continuation; they are not part of it.
      stop_token_ids: tokens that end it, beside the model's end-of-sequence tokens.
      ignore_eos: go on after an end-of-sequence token, as benchmarks do.
      logprobs: log-probabilities to return, per token: 0 none, n those of the token and of the n most
        probable ones, before bias, penalties and temperature.
      prompt_logprobs: the same of the prompt's tokens, each behind those before it; the first has none.
      num_samples: independent continuations.
      num_beams: above 1, beam search of that width, which takes no sampling settings.
      length_penalty: beams are compared by sum of log-probabilities over length to this power.
      early_stopping: end beam search as soon as there are ``num_beams`` finished continuations.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int = 0
    prompt_logprobs: int = 0
    num_samples: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False

    def __post_init__(self) -> None:
        _require_whole("prompt_logprobs", self.prompt_logprobs, 0, MOST_LOGPROBS)
        _require_whole("max_new_tokens", self.max_new_tokens, 0 if self.prompt_logprobs else 1, 2**31 - 1)
        _require_number("temperature", self.temperature, 0.0, 1e4, "a number from 0 (greedy) up")
        _require_whole("top_k", self.top_k, 0, 2**31 - 1)
        _require_number("top_p", self.top_p, 0.0, 1.0, "above 0, at most 1")
        require(self.top_p > 0, "top_p", self.top_p, "above 0, at most 1")
        _require_number("min_p", self.min_p, 0.0, 1.0, "from 0 to 1")
        _require_number("repetition_penalty", self.repetition_penalty, 1e-4, 1e4, "a number above 0")
        _require_number("presence_penalty", self.presence_penalty, -1e4, 1e4, "a finite number")
        _require_number("frequency_penalty", self.frequency_penalty, -1e4, 1e4, "a finite number")
        _require_biases(self.logit_bias)
        _require_whole("seed", self.seed, 0, LARGEST_SEED)
        _require_whole("logprobs", self.logprobs, 0, MOST_LOGPROBS)
        _require_whole("num_samples", self.num_samples, 1, MOST_SAMPLES)
        _require_whole("num_beams", self.num_beams, 1, MOST_SAMPLES)
        _require_number("length_penalty", self.length_penalty, -1e4, 1e4, "a finite number")
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            require(isinstance(value, tuple), name, value, "a tuple")
            require(len(value) <= MOST_STOPS, name, f"{len(value)} long", f"at most {MOST_STOPS}")
        texts = all(isinstance(text, str) and text for text in self.stop)
        require(texts, "stop", self.stop, "strings that are not empty")
        ids = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in self.stop_token_ids)
        require(ids, "stop_token_ids", self.stop_token_ids, "token ids")
        if self.num_beams > 1:
            plain = GenerationSettings()
            for name in (*SAMPLING, "logit_bias", "num_samples", "logprobs", "prompt_logprobs"):
                fits = getattr(self, name) == getattr(plain, name)
                require(fits, name, getattr(self, name), f"{getattr(plain, name)} under beam search")

    @property
    def penalized(self) -> bool:
        """Whether a token's logit is changed by a bias, or by earlier tokens."""
        penalties = self.presence_penalty, self.frequency_penalty
        return self.repetition_penalty != 1 or any(penalties) or bool(self.logit_bias)

    @property
    def sampled(self) -> bool:
        """Whether tokens are sampled rather than chosen greedily."""
        return self.temperature > 0

    @property
    def limited(self) -> bool:
        """Whether sampling is restricted to some of the tokens."""
        return self.sampled and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
"""The numbers that decide, with ``logit_bias``, which token follows given logits."""


def _require_biases(value: Any) -> None:
    """Refuse what is no ``logit_bias``, by its name."""
    pairs = isinstance(value, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value)
    require(pairs, "logit_bias", value, "a tuple of (token, number) pairs")
    require(len(value) <= MOST_BIASES, "logit_bias", f"{len(value)} long", f"at most {MOST_BIASES}")
    require(len(dict(value)) == len(value), "logit_bias", "twice of one token", "each token once")
    for token, bias in value:
        _require_whole("logit_bias of a token", token, 0, 2**31 - 1)
        _require_number("logit_bias", bias, -1e4, 1e4, "a finite number")


def _require_number(name: str, value: Any, low: float, high: float, expected: str) -> None:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    require(fits and math.isfinite(value) and low <= value <= high, name, value, expected)


def _require_whole(name: str, value: Any, low: int, high: int) -> None:
    fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    require(fits, name, value, f"a whole number from {low} to {high}")
