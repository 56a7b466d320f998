"""The prompt format, stored with every adapter: how a text, a record or a chat becomes tokens.

An adapter, and above all its router, was tuned on prompts of one format; prompts of another format are other
inputs. The format is therefore stored beside the parameters and used wherever the adapter answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from milora_jax.errors import UserError, one_of

TEMPLATES = ("alpaca", "chat")
SPECIAL_TOKENS = ("tokenizer", "bos", "none")


@dataclass(frozen=True)
class PromptFormat:
    """The format of prompts, beside the tokenizer itself.

    Attributes:
      template: one of TEMPLATES, see ``data.prompts``; "" where it is unknown, as for an imported adapter.
      special_tokens: special tokens around a text that no chat template wrote: ``tokenizer``, those of
        ``tokenizer(text)``; ``bos``, one beginning-of-sequence token before it, where the tokenizer has one;
        ``none``, none.
      time: result of ``strftime_now`` in a chat template, ISO 8601 without an offset; "" is the present time.
    """

    template: str = "alpaca"
    special_tokens: str = "tokenizer"
    time: str = ""

    def __post_init__(self) -> None:
        if self.template:
            one_of("data.template", self.template, TEMPLATES)
        one_of("data.special_tokens", self.special_tokens, SPECIAL_TOKENS)
        if self.time:
            parse_time(self.time)

    def to_dict(self) -> dict[str, str]:
        """Convert to a dictionary, ready for JSON."""
        return dataclasses.asdict(self)


UNSTORED = PromptFormat(template="", special_tokens="bos")
"""The format of adapters that were stored without one: their prompts began with one
beginning-of-sequence token, whatever their tokenizer did by itself."""


def stored_prompt_format(values: Any, where: str) -> PromptFormat:
    """Read the format that :meth:`PromptFormat.to_dict` gave.

    Args:
      values: None, where nothing was stored, gives :data:`UNSTORED`.
      where: the file, for errors.

    Raises:
      UserError: a field is missing, unknown or out of its range.
    """
    if values is None:
        return UNSTORED
    names = {field.name for field in dataclasses.fields(PromptFormat)}
    fits = isinstance(values, Mapping) and values.keys() == names
    if not fits or not all(isinstance(value, str) for value in values.values()):
        raise UserError(f"{where}: prompt_format is {values!r}, expected texts {', '.join(sorted(names))}")
    try:
        return PromptFormat(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def parse_time(text: str) -> datetime:
    """Parse the time of a :class:`PromptFormat`.

    Raises:
      UserError: the text is not a time, or has an offset from UTC.
    """
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        time = None
    if time is None or time.tzinfo is not None:
        raise UserError(f"data.template_time is {text!r}: expected a time such as 2026-11-29T12:00:00")
    return time
