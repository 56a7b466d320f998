"""Work that the device has started, and how its results reach the requests."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from milora_jax.generation.constraint import Constraint, ConstraintError, full_masks
from milora_jax.generation.decode import Decoded
from milora_jax.generation.prompt_logprobs import PromptLogprobs
from milora_jax.generation.prompt_lookup import PromptLookup
from milora_jax.generation.request import Request, TokenLogprobs
from milora_jax.generation.sampling import Choice, Sampler, make_sampler
from milora_jax.model_config import ModelConfig
from milora_jax.parallel.processes import gather

End = Callable[[Request, int, str], None]
"""Ends a sample of a request for a reason, as ``Engine.end`` does."""


@dataclass(eq=False)
class RunningSample:
    """One sample of a request while it holds a batch slot.

    Attributes:
      left: most tokens that are still to be computed for the sample: a step computes one at least.
      prefilling: whether its prompt is still being prefilled.
    """

    request: Request
    sample: int
    left: int
    prefilling: bool = False

    @classmethod
    def all_of(cls, request: Request) -> list[RunningSample]:
        """Return the samples of a request before their first tokens, which prefill gives them."""
        settings = request.settings
        return [cls(request, sample, settings.max_new_tokens - 1) for sample in range(settings.num_samples)]

    @property
    def constraint(self) -> Constraint | None:
        """The constraint of the sample; None for none."""
        return self.request.constraints[self.sample] if self.request.constraints else None


def sampler_of(samples: Sequence[RunningSample], config: ModelConfig, penalties: bool) -> Sampler:
    """Return the samplers of samples that have not been started.

    Args:
      penalties: whether rows may have penalties and biases.
    """
    requests = [sample.request for sample in samples]
    return make_sampler(
        [request.settings for request in requests],
        [sample.sample for sample in samples],
        [request.prompt for request in requests],
        config.eos_ids,
        config.vocab_size,
        penalties,
    )


def lookup_of(samples: Sequence[RunningSample], length: int, count: int) -> PromptLookup | None:
    """Return the texts of samples that have not been started; None without prompt look-up.

    Args:
      length: positions of the longest text.
      count: tokens that are proposed at each step; 0 for no prompt look-up.
    """
    if not count:
        return None
    allowed = [sample.constraint is None for sample in samples]
    return PromptLookup.of([sample.request.prompt for sample in samples], allowed, length, count)


@dataclass(frozen=True)
class StartedWork:
    """Work that the device has started and whose results have not been read.

    Attributes:
      sequences: samples in the batch slots when it was started.
      decoded: their tokens.
      route: route of the prompts that were prefilled, ``[L, B, E]``.
      prompt_logprobs: those of the prefilled prompts, in parts along T; None where none were requested.
    """

    sequences: tuple[RunningSample | None, ...]
    decoded: Decoded
    route: Any = None
    prompt_logprobs: tuple[PromptLogprobs, ...] | None = None

    @classmethod
    def of(cls, sequences: tuple[RunningSample | None, ...], *results: Any) -> StartedWork:
        """Work whose results every process will read, whichever of the devices compute them."""
        return cls(sequences, *gather(results))


class PendingResults:
    """The work that the device has started and the host has not read, the oldest first.

    Args:
      eos_ids: the model's end-of-sequence tokens.
      end: ends a sample.
    """

    def __init__(self, eos_ids: Sequence[int], end: End) -> None:
        self._eos_ids, self._end = eos_ids, end
        self._work: deque[StartedWork] = deque()
        self._touched: dict[int, Request] = {}

    def __bool__(self) -> bool:
        return bool(self._work)

    def add(self, samples: Sequence[RunningSample | None], *results: Any) -> None:
        """Add work; ``results`` are the further fields of :class:`StartedWork`."""
        self._work.append(StartedWork.of(tuple(samples), *results))

    def read(self, unread: int = 0) -> None:
        """Read the results of all work but the last ``unread``."""
        while len(self._work) > unread:
            # Taken out after it has been read: if that raises, its sequences must be known.
            for request in read_results(self._work[0], self._eos_ids, self._end):
                self._touched[id(request)] = request
            self._work.popleft()

    def end(self, request: Request, sample: int, reason: str) -> None:
        """End a sample whose request gets to know it with its next results."""
        self._touched[id(request)] = request
        self._end(request, sample, reason)

    def touched(self) -> list[Request]:
        """Return the requests that have got tokens or ended since the last call."""
        touched, self._touched = self._touched, {}
        return list(touched.values())

    def drop(self) -> list[Request]:
        """Forget all work, and return the requests that it was for."""
        work, self._work = self._work, deque()
        return [sample.request for each in work for sample in each.sequences if sample is not None]


def read_results(started: StartedWork, eos_ids: Sequence[int], end: End) -> list[Request]:
    """Wait for the device, append the tokens to their requests, and end the samples that are complete.

    Args:
      eos_ids: the model's end-of-sequence tokens.
      end: called for a sample that ends here.

    Returns:
      The requests that got tokens or ended.
    """
    decoded, route, prompt_logprobs = jax.device_get(
        (started.decoded, started.route, started.prompt_logprobs)
    )
    touched = []
    for row, sequence in enumerate(started.sequences):
        if sequence is None or sequence.request.finish[sequence.sample] is not None:
            continue
        request = sequence.request
        if route is not None:
            request.route = route[:, row]
        if prompt_logprobs is not None and request.settings.prompt_logprobs:
            whole = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *prompt_logprobs)
            request.prompt_logprobs = whole.of_row(row, request)
        places = np.flatnonzero(~decoded.absent[:, row])
        if decoded.proposed is not None:
            request.proposed_tokens += int(decoded.proposed[:, row].sum())
            width = len(decoded.absent) // len(decoded.proposed)
            request.accepted_tokens += int(np.count_nonzero(places % width))
        for place in places.tolist():
            _append(sequence, decoded.choices, place, row, eos_ids, end)
            if request.finish[sequence.sample] in ("error", "constraint"):
                break
        touched.append(request)
    return touched


def _append(
    sequence: RunningSample, choices: Choice, place: int, row: int, eos_ids: Sequence[int], end: End
) -> None:
    """Append one token to a sample, and end the sample if it is the last."""
    request, sample = sequence.request, sequence.sample
    if not choices.finite[place, row]:
        end(request, sample, "error")
        return
    settings, token = request.settings, int(choices.token[place, row])
    if settings.max_new_tokens == 0:
        end(request, sample, "length")
        return
    request.tokens[sample].append(token)
    top_tokens, top_logprobs = choices.top_tokens, choices.top_logprobs
    if settings.logprobs and not (choices.logprob is None or top_tokens is None or top_logprobs is None):
        pairs = zip(top_tokens[place, row], top_logprobs[place, row], strict=True)
        top = tuple((int(i), float(value)) for i, value in pairs)[: settings.logprobs]
        request.logprobs[sample].append(TokenLogprobs(float(choices.logprob[place, row]), top))
    if token in settings.stop_token_ids or (token in eos_ids and not settings.ignore_eos):
        end(request, sample, "stop")
    elif len(request.tokens[sample]) >= settings.max_new_tokens:
        end(request, sample, "length")
    elif (constraint := sequence.constraint) is not None:
        try:
            constraint.accept(token)
        except ConstraintError as error:
            _fail(sequence, error, end)


def masks_of(sequences: Sequence[RunningSample | None], vocab_size: int, end: End) -> np.ndarray | None:
    """Return packed masks of the tokens that samples may get next, ``[B, ceil(V / 32)]``; None for all.

    Args:
      end: called for a sample whose constraint fails; its row may get any token, which is dropped.
    """
    if not any(sequence is not None and sequence.constraint is not None for sequence in sequences):
        return None
    masks = full_masks(len(sequences), vocab_size)
    for row, sequence in enumerate(sequences):
        if sequence is None or sequence.constraint is None:
            continue
        if sequence.request.finish[sequence.sample] is None:
            try:
                masks[row] = sequence.constraint.mask()
            except ConstraintError as error:
                _fail(sequence, error, end)
    return masks


def _fail(sequence: RunningSample, error: ConstraintError, end: End) -> None:
    sequence.request.failure = str(error)
    end(sequence.request, sequence.sample, "constraint")
