"""What the device has been given, and how its results reach the requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from milora_jax.generation.prompt_logprobs import PromptLogprobs
from milora_jax.generation.request import Request, TokenLogprobs
from milora_jax.generation.sampling import Choice

End = Callable[[Request, int, str], None]
"""Ends a sample of a request for a reason, as ``Engine.end`` does."""


@dataclass(eq=False)
class RunningSample:
    """One sample of a request, while it holds a batch slot.

    Attributes:
      left: tokens that are still to be computed for the sample, by its length alone.
    """

    request: Request
    sample: int
    left: int


@dataclass(frozen=True)
class StartedWork:
    """Work that the device has been given and whose results have not been read.

    Attributes:
      sequences: those in the batch slots when it was started.
      choices: leaves ``[steps, B, ...]``.
      ended: batch slots whose sequence had ended before each step, ``[steps, B]``.
      route: of the prompts that were prefilled, ``[L, B, E]``.
      prompt_logprobs: of the prompts that were prefilled; None where none were asked for. A single prompt
        that is continued in several ways has one row.
    """

    sequences: tuple[RunningSample | None, ...]
    choices: Choice
    ended: Any
    route: Any = None
    prompt_logprobs: PromptLogprobs | None = None


def read_results(started: StartedWork, eos_ids: Sequence[int], end: End) -> list[Request]:
    """Wait for the device, append the tokens to their requests, and end the samples that are complete.

    Args:
      eos_ids: the model's end-of-sequence tokens.
      end: called for a sample that ends here.

    Returns:
      The requests that got tokens or ended.
    """
    choices, ended, route, prompt_logprobs = jax.device_get(
        (started.choices, started.ended, started.route, started.prompt_logprobs)
    )
    touched = []
    for row, sequence in enumerate(started.sequences):
        if sequence is None or sequence.request.finish[sequence.sample] is not None:
            continue
        request = sequence.request
        if route is not None:
            request.route = route[:, row]
        if prompt_logprobs is not None and request.settings.prompt_logprobs:
            prompt = min(row, len(prompt_logprobs.logprob) - 1)
            request.prompt_logprobs = prompt_logprobs.of_row(prompt, request)
        for step in range(len(ended)):
            if ended[step, row]:
                break
            _append(sequence, choices, step, row, eos_ids, end)
            if request.finish[sequence.sample] == "error":
                break
        touched.append(request)
    return touched


def _append(
    sequence: RunningSample, choices: Choice, step: int, row: int, eos_ids: Sequence[int], end: End
) -> None:
    """Append one token to a sample, and end the sample if it is the last."""
    request, sample = sequence.request, sequence.sample
    if not choices.finite[step, row]:
        end(request, sample, "error")
        return
    settings, token = request.settings, int(choices.token[step, row])
    if settings.max_new_tokens == 0:
        end(request, sample, "length")
        return
    request.tokens[sample].append(token)
    top_tokens, top_logprobs = choices.top_tokens, choices.top_logprobs
    if settings.logprobs and not (choices.logprob is None or top_tokens is None or top_logprobs is None):
        pairs = zip(top_tokens[step, row], top_logprobs[step, row], strict=True)
        top = tuple((int(i), float(value)) for i, value in pairs)[: settings.logprobs]
        request.logprobs[sample].append(TokenLogprobs(float(choices.logprob[step, row]), top))
    if token in settings.stop_token_ids or (token in eos_ids and not settings.ignore_eos):
        end(request, sample, "stop")
    elif len(request.tokens[sample]) >= settings.max_new_tokens:
        end(request, sample, "length")
