"""Chooses the next token of every row from its logits, by the settings of the row.

A row's choice depends on its own logits, settings, seed and place in its own text, never on the other
rows or on its place in the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from milora_jax.generation.constraint import BITS
from milora_jax.generation.settings import MOST_LOGPROBS, MOST_STOPS, SAMPLING, GenerationSettings
from milora_jax.shapes import Array, Bool, Float, Int, UInt

NO_TOKEN = -1


@dataclass(frozen=True)
class Plan:
    """The features that a decode program must support; static, so that it computes no more.

    Attributes:
      sampled: some row draws.
      limited: some row draws from a part of the vocabulary, for which it is sorted.
      penalized: some row has a penalty or a bias.
      logprobs: some row reports log-probabilities.
    """

    sampled: bool = False
    limited: bool = False
    penalized: bool = False
    logprobs: bool = False

    def covers(self, other: Plan) -> bool:
        """Whether this plan supports everything that the other does."""
        return all(mine or not theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True))

    @classmethod
    def of(cls, settings: Sequence[GenerationSettings]) -> Plan:
        """Return the smallest plan that serves all of these."""
        return cls(
            sampled=any(s.sampled for s in settings),
            limited=any(s.limited for s in settings),
            penalized=any(s.penalized for s in settings),
            logprobs=any(s.logprobs for s in settings),
        )


@struct.dataclass
class Sampler:
    """The settings of every row, and the state that they depend on.

    Attributes:
      seed: seed of the row's random numbers; one per sample of a request.
      remaining: tokens that the row may still produce.
      ends: tokens that end the row, filled up with -1.
      in_prompt: which tokens the prompt holds; None, as the next two, where no row may have a penalty.
      in_text: how often the continuation holds each token.
      bias: bias of every token's logit.
    """

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    repetition_penalty: Float[Array, " B"]
    presence_penalty: Float[Array, " B"]
    frequency_penalty: Float[Array, " B"]
    seed: UInt[Array, "B 2"]
    remaining: Int[Array, " B"]
    ends: Int[Array, "B stops"]
    in_prompt: Bool[Array, "B V"] | None
    in_text: Int[Array, "B V"] | None
    bias: Float[Array, "B V"] | None


@struct.dataclass
class Choice:
    """The tokens of one step.

    Attributes:
      token: chosen tokens.
      finite: whether all of the row's logits are numbers; its token means nothing where they are not.
      logprob: their log-probabilities before bias, penalties and temperature; None unless asked for.
      top_tokens, top_logprobs: the most probable tokens; None unless asked for.
    """

    token: Int[Array, " B"]
    finite: Bool[Array, " B"]
    logprob: Float[Array, " B"] | None
    top_tokens: Int[Array, "B n"] | None
    top_logprobs: Float[Array, "B n"] | None


def make_sampler(
    settings: Sequence[GenerationSettings],
    samples: Sequence[int],
    prompts: Sequence[Sequence[int]],
    end_ids: tuple[int, ...],
    vocab_size: int,
    penalties: bool,
) -> Sampler:
    """Return the samplers of some rows.

    Args:
      samples: which of its request's samples a row is.
      prompts: token ids, for the penalties.
      end_ids: the model's end-of-sequence tokens.
      penalties: whether rows may have penalties and biases.
    """
    ends = np.full((len(settings), MOST_STOPS + len(end_ids)), NO_TOKEN, np.int32)
    for row, mine in enumerate(settings):
        ids = (*mine.stop_token_ids, *(() if mine.ignore_eos else end_ids))
        ends[row, : len(ids)] = ids
    in_prompt = in_text = bias = None
    if penalties:
        in_prompt = np.zeros((len(settings), vocab_size), bool)
        for row, ids in enumerate(prompts):
            in_prompt[row, list(ids)] = True
        in_text, bias = np.zeros_like(in_prompt, np.int32), np.zeros_like(in_prompt, np.float32)
        for row, mine in enumerate(settings):
            for token, number in mine.logit_bias:
                bias[row, token] = number

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(s, name) for s in settings], dtype)

    # Host arrays: they become device arrays when they are admitted.
    fields: dict[str, Any] = {
        **{name: column(name, np.int32 if name == "top_k" else np.float32) for name in SAMPLING},
        "seed": np.array([(s.seed, i) for s, i in zip(settings, samples, strict=True)], np.uint32),
        "remaining": column("max_new_tokens", np.int32),
        "ends": ends,
        "in_prompt": in_prompt,
        "in_text": in_text,
        "bias": bias,
    }
    return Sampler(**fields)


def choose(
    logits: Float[Array, "B V"],
    sampler: Sampler,
    position: Int[Array, " B"],
    plan: Plan,
    masks: UInt[Array, "B W"] | None = None,
) -> Choice:
    """Return the next token of every row.

    Args:
      position: position of the new token in its row's text: each place has its own random numbers.
      masks: the tokens that each row may get, packed as in ``generation.constraint``; None for all tokens.
    """
    with jax.named_scope("choose"):
        scores = logits if masks is None else jnp.where(_allowed(masks, logits), logits, -jnp.inf)
        scores = _penalized(scores, sampler) if plan.penalized else scores
        token = jnp.argmax(scores, axis=-1)
        if plan.sampled:
            scores = _over_temperature(scores, sampler)
            scores = _kept(scores, sampler) if plan.limited else scores
            drawn = _drawn(scores, sampler.seed, position)
            token = jnp.where(sampler.temperature > 0, drawn, token)
        token = token.astype(jnp.int32)
        finite = jnp.isfinite(logits).all(axis=-1)
        if not plan.logprobs:
            return Choice(token, finite, None, None, None)
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        top_logprobs, top_tokens = jax.lax.top_k(logprobs, min(MOST_LOGPROBS, logits.shape[-1]))
        mine = jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]
        return Choice(token, finite, mine, top_tokens, top_logprobs)


def note(sampler: Sampler, token: Int[Array, " B"], live: Bool[Array, " B"]) -> Sampler:
    """Return the sampler after ``token`` was produced by the live rows."""
    remaining = sampler.remaining - live.astype(jnp.int32)
    if sampler.in_text is None:
        return dataclasses.replace(sampler, remaining=remaining)
    rows = jnp.arange(token.shape[0])
    counts = sampler.in_text.at[rows, token].add(live.astype(jnp.int32))
    return dataclasses.replace(sampler, remaining=remaining, in_text=counts)


def is_end(sampler: Sampler, token: Int[Array, " B"]) -> Bool[Array, " B"]:
    """Whether the row ends with this token, by its stop tokens or by its length."""
    return (token[:, None] == sampler.ends).any(axis=-1) | (sampler.remaining <= 0)


def _allowed(masks: UInt[Array, "B W"], logits: Float[Array, "B V"]) -> Bool[Array, "B V"]:
    """Packed masks as one bool for each token."""
    bits = (masks[:, :, None] >> jnp.arange(BITS, dtype=masks.dtype)[None, None, :]) & 1
    return bits.reshape(masks.shape[0], -1)[:, : logits.shape[1]] == 1


def _penalized(logits: Float[Array, "B V"], sampler: Sampler) -> Float[Array, "B V"]:
    """Bias, then repetition, frequency and presence penalty, in vLLM's order."""
    if sampler.in_prompt is None or sampler.in_text is None or sampler.bias is None:
        raise ValueError("penalties need a sampler that remembers tokens")
    logits = logits + sampler.bias
    in_text = sampler.in_text > 0
    seen = sampler.in_prompt | in_text
    penalty = sampler.repetition_penalty[:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    logits = logits - sampler.frequency_penalty[:, None] * sampler.in_text.astype(logits.dtype)
    return logits - sampler.presence_penalty[:, None] * in_text.astype(logits.dtype)


def _over_temperature(scores: Float[Array, "B V"], sampler: Sampler) -> Float[Array, "B V"]:
    """Scores over temperature; as they are in greedy rows."""
    return scores / jnp.where(sampler.temperature > 0, sampler.temperature, 1.0)[:, None]


def _kept(scores: Float[Array, "B V"], sampler: Sampler) -> Float[Array, "B V"]:
    """Scores, minus infinity where top-k, top-p or min-p leaves a token out.

    Tokens that tie with the last one kept are kept. A row without limits keeps every score as it is.
    """
    vocab = scores.shape[-1]
    falling = -jnp.sort(-scores, axis=-1)
    last = jnp.where(sampler.top_k > 0, jnp.minimum(sampler.top_k, vocab), vocab) - 1
    least = jnp.take_along_axis(falling, last[:, None], axis=-1)
    falling = jnp.where(falling < least, -jnp.inf, falling)
    probs = jax.nn.softmax(falling, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    # The most probable token always stays: nothing lies before it, and it is all of its own maximum.
    top_p = sampler.top_p[:, None]
    # At 1 rounding in the sum must not cut the tail off.
    kept = ((before < top_p) | (top_p >= 1)) & (probs >= sampler.min_p[:, None] * probs[:, :1])
    least = jnp.min(jnp.where(kept & (falling >= least), falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scores < least, -jnp.inf, scores)


def _drawn(
    scores: Float[Array, "B V"], seed: UInt[Array, "B 2"], position: Int[Array, " B"]
) -> Int[Array, " B"]:
    """A token from each row's softmax, by the Gumbel maximum."""

    def draw(scores: Array, seed: Array, position: Array) -> Array:
        key = jax.random.key(seed[0])
        key = jax.random.fold_in(jax.random.fold_in(key, seed[1]), position)
        return jnp.argmax(scores + jax.random.gumbel(key, scores.shape, scores.dtype))

    return jax.vmap(draw)(scores, seed, position)
