"""Every number that bounds a server, in one place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from milora_jax.errors import UserError, require

MAY_BE_ZERO = ("context", "max_lora_rank", "samples", "grace_seconds")
"""Limits of which 0 means something of its own."""

USUAL_SAMPLES = 4


def flag_of(name: str) -> str:
    """The option of ``serve.py`` that sets a limit.

    >>> flag_of("queue_tokens")
    '--queue-tokens'
    """
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class Limits:
    """What one server takes on, and how long it waits.

    Attributes:
      rows: continuations decoded together; its programs are compiled for this number and no other.
      context: tokens of a prompt and its continuation together; 0 is what the model has.
      chunk: decode steps between two looks at who has ended: the longest that a new request waits for the
        device, and the tokens that a stream gets at a time.
      adapters_on_device: adapters that can be used at the same time.
      max_lora_rank: highest rank of the pairs of an adapter that is loaded later; 0 is that of the adapters
        at the start, rounded up to a power of two.
      queue: requests that wait, of all tenants; more are refused with 503.
      queue_tokens: tokens of the prompts that wait.
      body_bytes: of a request's body.
      body_seconds: in which a request's body must have come.
      header_bytes: of a request's first line and headers.
      header_seconds: in which they must have come.
      headers: of a request.
      messages: of one chat.
      stops: stop strings of a request.
      stop_characters: of each of them.
      samples: continuations of one request; 0 is 4, or ``rows`` where that is less.
      unread_bytes: that one response may hold for a client who does not read.
      write_seconds: in which a client who does not read must take some of it.
      grace_seconds: after SIGTERM, for what was begun.
      stalled_seconds: without an end of a step while there is work, after which a server is not ready.
    """

    rows: int = 8
    context: int = 0
    chunk: int = 8
    adapters_on_device: int = 8
    max_lora_rank: int = 0
    queue: int = 256
    queue_tokens: int = 65536
    body_bytes: int = 2**20
    body_seconds: float = 30.0
    header_bytes: int = 2**14
    header_seconds: float = 10.0
    headers: int = 64
    messages: int = 256
    stops: int = 4
    stop_characters: int = 64
    samples: int = 0
    unread_bytes: int = 2**16
    write_seconds: float = 20.0
    grace_seconds: float = 30.0
    stalled_seconds: float = 30.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in MAY_BE_ZERO else 1
            require(value >= least, flag_of(field.name), value, f"at least {least}")
        require(self.samples <= self.rows, flag_of("samples"), self.samples, f"at most --rows {self.rows}")

    @property
    def most_samples(self) -> int:
        """Continuations that one request may ask for."""
        return self.samples or min(USUAL_SAMPLES, self.rows)

    @classmethod
    def of(cls, values: Mapping[str, str]) -> Limits:
        """Limits by name, as a command line has them.

        Raises:
          UserError: there is no such limit, or it is no number.
        """
        kinds = {field.name: type(field.default) for field in dataclasses.fields(cls)}
        found = {}
        for name, text in values.items():
            if name not in kinds:
                raise UserError(f"{name!r} is no setting: expected one of {', '.join(kinds)}")
            try:
                found[name] = kinds[name](text)
            except ValueError:
                raise UserError(f"{name} is {text!r}: expected a number") from None
        return cls(**found)
