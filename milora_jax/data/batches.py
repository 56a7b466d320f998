"""The rows of a step, and the conversion of rows to a batch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from milora_jax.data.tokens import Example
from milora_jax.types import Batch

ORDER_STREAM = 2
"""Separates the order of rows from every other use of the run's seed."""


@functools.lru_cache(maxsize=4)
def row_order(seed: int, epoch: int, rows: int) -> np.ndarray:
    """The permutation of an epoch, a pure function of its arguments.

    Those of this epoch and the next, of training and of dev rows, are kept, because every step asks for them.
    """
    order = np.random.default_rng([seed, ORDER_STREAM, epoch]).permutation(rows)
    order.flags.writeable = False
    return order


def batch_rows(seed: int, step: int, rows: int, batch_size: int) -> np.ndarray:
    """The row numbers of a step, from 0, a pure function of its arguments.

    Batches continue across the end of an epoch, so each epoch has every row exactly once.
    """
    first = step * batch_size
    epochs = range(first // rows, (first + batch_size - 1) // rows + 1)
    return np.concatenate(
        [
            row_order(seed, epoch, rows)[max(first - epoch * rows, 0) : first + batch_size - epoch * rows]
            for epoch in epochs
        ]
    )


def padded_length(longest: int, multiple: int, limit: int) -> int:
    """Round ``longest`` up to a multiple, but at most to ``limit``.

    >>> padded_length(70, 32, 768), padded_length(70, 32, 80)
    (96, 80)
    """
    return min(-(-longest // multiple) * multiple, limit)


def collate(
    packed: Sequence[Sequence[Example]], length: int, rows: int, prompts: int = 1, answers: int = 1
) -> Batch:
    """Make a batch of training rows, padded on the right; missing rows are padding, which counts nowhere.

    Args:
      packed: the examples of each row, which become its segments 1, 2, ...
      length: T, at least the number of tokens of any row.
      rows: B, at least the number of rows given.
      prompts: Z, at least the number of prompts of any row.
      answers: A, examples in a row that follow one prompt and have its route.
    """
    batch = _empty(rows, length, prompts=prompts, answers=answers)
    for row, examples in enumerate(packed):
        start = 0
        for segment, example in enumerate(examples, 1):
            end = start + len(example.tokens)
            batch.tokens[row, start:end] = example.tokens
            batch.segment_ids[row, start:end] = segment
            batch.positions[row, start:end] = np.arange(end - start)
            if (segment - 1) % answers == 0:  # the first answer's copy of the prompt
                batch.prompt_mask[row, start : start + example.routed] = True
                if batch.labels is not None:
                    batch.labels[row, (segment - 1) // answers] = example.label
            for first, last in example.learned:
                batch.loss_mask[row, start + first : start + last] = True
            start = end
    return batch


def collate_prompts(
    prompts: Sequence[Sequence[int]],
    length: int,
    pad_id: int,
    rows: int,
    route_tokens: Sequence[int] = (),
) -> Batch:
    """Prompts for generation, padded on the right: a token's place does not depend on other rows.

    Missing rows hold a prompt of one token, so that no row is empty.

    Args:
      route_tokens: how many tokens of each prompt the routers read, 0 for all; empty is all of every one.
    """
    batch = _empty(rows, length, pad_id)
    filled = [*prompts, *([[pad_id]] * (rows - len(prompts)))]
    scopes = [*route_tokens, *([0] * (rows - len(route_tokens)))]
    for row, (ids, scope) in enumerate(zip(filled, scopes, strict=True)):
        here = slice(0, len(ids))
        batch.tokens[row, here] = ids
        batch.segment_ids[row, here] = 1
        batch.positions[row, here] = np.arange(len(ids))
        batch.prompt_mask[row, : scope or len(ids)] = True
    return batch


def _empty(rows: int, length: int, pad_id: int = 0, prompts: int = 1, answers: int = 1) -> Batch:
    shape = (rows, length)
    # Host arrays, which become device arrays when they are placed.
    fields: dict[str, Any] = {
        "tokens": np.full(shape, pad_id, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
        "prompt_mask": np.zeros(shape, bool),
        "loss_mask": np.zeros(shape, bool),
        "labels": None if answers == 1 else np.zeros((rows, prompts), bool),
    }
    return Batch(**fields, prompts=prompts, answers=answers)
