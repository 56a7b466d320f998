"""The loss on test rows: how improbable a model finds the outputs that the rows give.

It is the mean negative log-likelihood of a response token, the end-of-sequence token among them, given the
prompt and the tokens before: the cross entropy that training minimises and, by its exponential, the dev
perplexity. Nothing is generated, and an ``answer`` beside the output is not scored.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from milora_jax.adapters.protocol import Adapter
from milora_jax.base.modules import Base
from milora_jax.data.records import Record
from milora_jax.data.tokens import encode_example
from milora_jax.evaluation.likelihood import Passage, log_likelihoods
from milora_jax.model_config import ModelConfig
from milora_jax.types import Batch

NO_OUTPUT, TOO_LONG, NO_END_TOKEN = "no_output", "too_long", "no_end_token"
LEFT_OUT = {
    NO_OUTPUT: "no output",
    TOO_LONG: "more tokens than the model has positions",
    NO_END_TOKEN: "a model without an end-of-sequence token",
}
"""Why a row has no loss, in words."""

LARGEST_EXPONENT = 700.0
"""The exponential of more is no float; dev perplexities have the same limit."""


@dataclass(frozen=True)
class Responses:
    """The encoded rows of a task whose outputs are scored.

    Attributes:
      left_out: how many of the others there are, by reason, see :data:`LEFT_OUT`.
    """

    passages: list[Passage]
    left_out: dict[str, int]


@dataclass(frozen=True)
class Loss:
    """Of one task, over all of its response tokens together.

    Attributes:
      mean: negative log-likelihood of a response token, in nats; None where no row was scored, or where it
        is not finite.
      scored: rows.
      tokens: response tokens of those rows.
      left_out: rows that were not scored, by reason, see :data:`LEFT_OUT`.
    """

    mean: float | None
    scored: int
    tokens: int
    left_out: Mapping[str, int]

    @property
    def perplexity(self) -> float | None:
        """The exponential of the mean; None where there is none."""
        return None if self.mean is None else math.exp(min(self.mean, LARGEST_EXPONENT))


def encode_responses(
    tokenizer: Any, records: Sequence[Record], config: ModelConfig, template: str
) -> Responses:
    """Encode the rows of a task as training does; no row is cut.

    Args:
      template: one of ``config.TEMPLATES``.

    Raises:
      UserError: a row cannot be written in this template.
    """
    passages, left_out = [], Counter()
    for record in records:
        if not record.output.strip():
            left_out[NO_OUTPUT] += 1
        elif not config.eos_ids:
            left_out[NO_END_TOKEN] += 1
        elif (
            example := encode_example(tokenizer, record, config.eos_ids, config.max_positions, template)
        ) is None:
            left_out[TOO_LONG] += 1
        else:
            tokens, prompt = tuple(example.tokens.tolist()), example.prompt_length
            passages.append(Passage(tokens, prompt, len(tokens) - prompt))
    return Responses(passages, dict(left_out))


def response_loss(
    base: Base,
    config: ModelConfig,
    adapter: Adapter | None,
    responses: Responses,
    rows: int,
    *,
    place: Callable[[Batch], Batch] = jax.device_put,
    advance: Callable[[int], None],
) -> Loss:
    """The loss of a task: a program for each length that occurs, see ``likelihood.log_likelihoods``.

    Args:
      base, adapter: in the decode layout; without an adapter the plain base.
      rows: of a batch.
      place: puts a batch on the devices.
      advance: called with the number of rows each time some are scored.
    """
    passages, total = responses.passages, 0.0
    for found in log_likelihoods(base, config, adapter, passages, rows, place=place):
        total -= sum(each.log_probability for each in found.values())
        advance(len(found))
    tokens = sum(passage.scored for passage in passages)
    mean = total / tokens if tokens and math.isfinite(total) else None
    return Loss(mean, len(passages), tokens, responses.left_out)
