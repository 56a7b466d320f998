"""The prompt format, stored with every adapter: how a text, a record or a chat becomes tokens.

An adapter, and above all its router, was tuned on prompts of one format; prompts of another format are other
inputs. The format is therefore stored beside the parameters and used wherever the adapter answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from milora_jax.errors import UserError, one_of

TEMPLATES = ("alpaca", "chat")
SPECIAL_TOKENS = ("tokenizer", "bos", "none")
ROUTE_ON = ("prompt", "first_turn", "system")
"""What of a prompt the routers read: all of it; the system messages and the first user message of a chat; its
system messages alone."""


@dataclass(frozen=True)
class PromptFormat:
    """The format of prompts, beside the tokenizer itself.

    Attributes:
      template: one of TEMPLATES, see ``data.prompts``; "" where it is not known, as of an imported adapter.
      special_tokens: what is put around a text that no chat template wrote: ``tokenizer``, what
        ``tokenizer(text)`` puts there; ``bos``, one beginning-of-sequence token before it, where the
        tokenizer has one; ``none``, nothing.
      time: what ``strftime_now`` tells a chat template, ISO 8601 without an offset; "" is the present time.
      route_on: one of ROUTE_ON. It is a setting of the method, ``adapter.route_on``, and stored with the
        others of it.
    """

    template: str = "alpaca"
    special_tokens: str = "tokenizer"
    time: str = ""
    route_on: str = "prompt"

    def __post_init__(self) -> None:
        if self.template:
            one_of("data.template", self.template, TEMPLATES)
        one_of("data.special_tokens", self.special_tokens, SPECIAL_TOKENS)
        if self.time:
            parse_time(self.time)
        one_of("adapter.route_on", self.route_on, ROUTE_ON)
        if self.route_on == "system" and self.template == "alpaca":
            raise UserError(
                "adapter.route_on is 'system', and data.template is 'alpaca', which writes no system "
                "message: expected data.template=chat"
            )

    def to_dict(self) -> dict[str, str]:
        """The fields that are stored, ready for JSON."""
        return {name: getattr(self, name) for name in STORED}


STORED = ("template", "special_tokens", "time")
"""The fields of a :class:`PromptFormat` that are stored with an adapter beside its settings."""

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
    fits = isinstance(values, Mapping) and values.keys() == set(STORED)
    if not fits or not all(isinstance(value, str) for value in values.values()):
        raise UserError(f"{where}: prompt_format is {values!r}, expected texts {', '.join(sorted(STORED))}")
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
