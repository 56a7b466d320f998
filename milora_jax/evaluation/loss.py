"""The loss on test rows: the negative log-likelihood of the rows' outputs.

It is the mean negative log-likelihood of a response token, the end-of-sequence token included, given the
prompt and the tokens before: the cross entropy of training, whose exponential is the dev perplexity. Nothing
is generated, and an ``answer`` beside the output is not scored.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from milora_jax.adapters.protocol import Adapter
from milora_jax.base.attention import DeviceLayout
from milora_jax.base.modules import Base
from milora_jax.data.chat import UnclosedThoughtError
from milora_jax.data.records import Record
from milora_jax.data.tokens import Example, encode_example, naming, require_embedded
from milora_jax.evaluation.likelihood import Passage, log_likelihoods
from milora_jax.model_config import ModelConfig
from milora_jax.prompt_format import PromptFormat

NO_OUTPUT, TOO_LONG, NO_END_TOKEN = "no_output", "too_long", "no_end_token"
IN_A_THOUGHT = "in_a_thought"
LEFT_OUT = {
    NO_OUTPUT: "no output",
    TOO_LONG: "more tokens than the model has positions",
    NO_END_TOKEN: "a model without an end-of-sequence token",
    IN_A_THOUGHT: "an output that does not close the thought that the chat template opens",
}
"""Reasons why a row has no loss, in words."""

LARGEST_EXPONENT = 700.0
"""Largest exponent whose exponential is a float; dev perplexities have the same limit."""


@dataclass(frozen=True)
class Responses:
    """The encoded rows of a task whose outputs are scored.

    Attributes:
      left_out: number of other rows by reason, see :data:`LEFT_OUT`.
    """

    passages: list[Passage]
    left_out: dict[str, int]


@dataclass(frozen=True)
class Loss:
    """The loss of one task over all of its response tokens.

    Attributes:
      mean: negative log-likelihood of a response token, in nats; None where no row was scored, or where it is
        not finite.
      scored: number of scored rows.
      tokens: number of response tokens of those rows.
      left_out: number of rows that were not scored by reason, see :data:`LEFT_OUT`.
    """

    mean: float | None
    scored: int
    tokens: int
    left_out: Mapping[str, int]

    @property
    def perplexity(self) -> float | None:
        """The exponential of the mean; None where there is no mean."""
        return None if self.mean is None else math.exp(min(self.mean, LARGEST_EXPONENT))


def encode_responses(
    tokenizer: Any, records: Sequence[Record], config: ModelConfig, prompt_format: PromptFormat
) -> Responses:
    """Encode the rows of a task as training does; no row is truncated.

    Raises:
      UserError: a row cannot be written in the format's template, or has a token without an embedding.
    """
    passages, left_out = [], Counter()
    for record in records:
        found = _encoded(tokenizer, record, config, prompt_format)
        if isinstance(found, str):
            left_out[found] += 1
            continue
        with naming(record):
            require_embedded(tokenizer, found.tokens, config.vocab_size)
        tokens = tuple(found.tokens.tolist())
        passages.append(Passage(tokens, found.routed, len(tokens) - found.prompt_length))
    return Responses(passages, dict(left_out))


def _encoded(
    tokenizer: Any, record: Record, config: ModelConfig, prompt_format: PromptFormat
) -> Example | str:
    """Encode a row, or return the reason why it is left out."""
    if not record.output.strip():
        return NO_OUTPUT
    if not config.eos_ids:
        return NO_END_TOKEN
    try:
        found = encode_example(tokenizer, record, config.eos_ids, config.max_positions, prompt_format)
    except UnclosedThoughtError:  # its question can be asked, though its output could not be learned
        return IN_A_THOUGHT
    return TOO_LONG if found is None else found


def response_loss(
    base: Base,
    config: ModelConfig,
    adapter: Adapter | None,
    responses: Responses,
    rows: int,
    *,
    layout: DeviceLayout | None = None,
    advance: Callable[[int], None],
) -> Loss:
    """The loss of a task; one program is compiled for each rounded length, see ``log_likelihoods``.

    Args:
      base, adapter: both in the decode layout; an adapter of None is the plain base.
      rows: rows of a batch.
      layout: of rows and heads over several devices.
      advance: called with the number of rows each time some are scored.
    """
    passages, total = responses.passages, 0.0
    for found in log_likelihoods(base, config, adapter, passages, rows, layout=layout):
        total -= sum(each.log_probability for each in found.values())
        advance(len(found))
    tokens = sum(passage.scored for passage in passages)
    mean = total / tokens if tokens and math.isfinite(total) else None
    return Loss(mean, len(passages), tokens, responses.left_out)
