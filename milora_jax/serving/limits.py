"""The limits of a server."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from milora_jax.errors import UserError, require

MAY_BE_ZERO = (
    *("context", "max_lora_rank", "samples", "grace_seconds"),
    *("prefill_budget", "prefix_cache", "share_prefixes", "prompt_lookup"),
)
"""The limits for which 0 has a special meaning."""

USUAL_SAMPLES = 4


def flag_of(name: str) -> str:
    """Return the option of ``serve.py`` that sets a limit.

    >>> flag_of("queue_tokens")
    '--queue-tokens'
    """
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class Limits:
    """The limits of one server; each is a flag of ``serve.py``.

    Attributes:
      rows: batch slots, the continuations that are decoded together; programs are compiled for this number.
      context: tokens of a prompt and its continuation together; 0 is the model's own.
      chunk: decode steps between two turns of the scheduler: the longest time that a new request waits for
        the device, and the tokens that a stream gets at a time.
      adapters_on_device: adapter slots, the adapters that can decode at the same time.
      prefill_budget: prompt tokens that are prefilled in one turn of the scheduler while others decode; with
        0, which is no limit, all streams wait for a long prompt.
      prefix_cache: mebibytes of keys and values of earlier prompts, for prompts that begin alike; 0 keeps
        none.
      share_prefixes: 1 lets tenants that use the same adapter find each other's prompts in the prefix cache,
        which the time to the first token can tell; 0 keeps tenants apart.
      prompt_lookup: tokens that a text may propose as its own next ones at each step, which one pass of the
        model checks; 0 switches speculation off.
      max_lora_rank: highest rank of the pairs of an adapter that is loaded later; 0 is that of the adapters
        at the start, rounded up to a power of two.
      queue: requests of all tenants that may wait; more are refused with 503.
      queue_tokens: tokens of all prompts that may wait.
      body_bytes: size of the body of a request.
      body_seconds: time in which the body of a request must arrive.
      header_bytes: size of the first line and the headers of a request.
      header_seconds: time in which they must arrive.
      headers: number of headers of a request.
      messages: number of messages of a chat.
      stops: number of stop strings of a request.
      stop_characters: length of a stop string.
      grammar_bytes: size of a grammar, a schema or a list of tools of a request.
      grammar_seconds: processor time in which a grammar must be compiled.
      prompts: prompts of one completion.
      samples: samples of one request, for each of its prompts; 0 is 4, or ``rows`` if that is less.
      unread_bytes: bytes of a response that may wait in memory for a slow reader.
      write_seconds: time in which a client must read some of a response that waits for it.
      grace_seconds: time after SIGTERM in which admitted requests may complete.
      stalled_seconds: time without a step, while there is work, after which a server is not ready.
    """

    rows: int = 8
    context: int = 0
    chunk: int = 8
    adapters_on_device: int = 8
    prefill_budget: int = 128
    prefix_cache: int = 256
    share_prefixes: int = 0
    prompt_lookup: int = 0
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
    grammar_bytes: int = 2**16
    grammar_seconds: float = 3.0
    prompts: int = 64
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
        """Most samples that one request may have."""
        return self.samples or min(USUAL_SAMPLES, self.rows)

    @classmethod
    def of(cls, values: Mapping[str, str]) -> Limits:
        """Return limits parsed from text, by name.

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
