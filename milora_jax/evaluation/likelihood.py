"""Log-likelihoods of given texts: the probability of the last tokens of a passage.

The router reads only the passage's prompt, as in training and in generation: the tokens after the prompt do
not change the route.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from milora_jax.adapters.protocol import Adapter
from milora_jax.base.attention import DeviceLayout, attention, device_layout
from milora_jax.base.modules import Base
from milora_jax.base.transformer import forward, unembed
from milora_jax.errors import require
from milora_jax.generation.lengths import bucket_of
from milora_jax.model_config import ModelConfig
from milora_jax.parallel.processes import to_host
from milora_jax.parallel.rules import place_rows
from milora_jax.shapes import Array, Bool, Float, Int
from milora_jax.types import Batch

CHUNK = 1024
"""Tokens whose logits are in memory at a time, the same number from every row."""


@dataclass(frozen=True)
class Passage:
    """Tokens, of which the last ones are scored.

    Attributes:
      tokens: at least two.
      prompt: how many of them, from the first, the routers read: the route is theirs.
      scored: how many, up to the last, are scored; none of them is prompt.
    """

    tokens: tuple[int, ...]
    prompt: int
    scored: int

    def __post_init__(self) -> None:
        length = len(self.tokens)
        require(1 <= self.prompt <= length - 1, "prompt", self.prompt, f"1 to {length - 1} tokens")
        most = length - self.prompt
        require(1 <= self.scored <= most, "scored", self.scored, f"1 to {most} tokens")


class Likelihood(NamedTuple):
    """The likelihood of a passage's scored tokens.

    Attributes:
      log_probability: log-probability of all of them together, in nats.
      greedy: whether each of them is the most probable token at its position.
    """

    log_probability: float
    greedy: bool


def rolling_passages(tokens: Sequence[int], prefix: int, width: int, led: bool) -> list[Passage]:
    """The windows of a whole text, in which each of its tokens is predicted once, as in lm_eval's
    ``loglikelihood_rolling``.

    Args:
      prefix: the token before the first one.
      width: most tokens that the model sees, at least 2.
      led: the prefix begins every window and is its prompt, in place of one token of context; otherwise the
        prompt of a later window is the text before its scored tokens.

    >>> [passage.tokens for passage in rolling_passages([5, 6, 7, 8, 9], 1, 3, led=False)]
    [(1, 5, 6, 7), (6, 7, 8, 9)]
    >>> [passage.tokens for passage in rolling_passages([5, 6, 7, 8, 9], 1, 3, led=True)]
    [(1, 5, 6, 7), (1, 7, 8, 9)]
    """
    ends = [*range(width, len(tokens), width - 1 if led else width), len(tokens)]
    windows = []
    for begin, end in pairwise([0, *ends]):
        lead, first = ((prefix,), end - width) if led or not begin else ((), end - width - 1)
        whole = (*lead, *tokens[max(first, 0) : end])
        scored = end - begin
        if scored:  # an empty text has no window
            windows.append(Passage(whole, 1 if led else len(whole) - scored, scored))
    return windows


def log_likelihoods(
    base: Base,
    config: ModelConfig,
    adapter: Adapter | None,
    passages: Sequence[Passage],
    rows: int,
    *,
    routes: Float[np.ndarray, "N L E"] | None = None,
    layout: DeviceLayout | None = None,
) -> Iterator[dict[int, Likelihood]]:
    """Score passages, the longest first, batch by batch.

    Every batch has ``rows`` rows, whose length is rounded up by ``generation.lengths.bucket_of``, so that one
    program is compiled for each rounded length.

    Args:
      base: in the decode layout.
      adapter: in the decode layout; None scores with the plain base.
      passages: passages of at most ``config.max_positions + 1`` tokens; the last token is only predicted.
      routes: routing weights of the passages, in place of those of the adapter's routers.
      layout: of rows and heads over several devices, as an ``Engine`` has it.

    Yields:
      The likelihoods of a batch, by the places of its passages in ``passages``.
    """
    for passage in passages:
        most, least = max(passage.tokens), min(passage.tokens)
        fits = least >= 0 and most < config.vocab_size
        require(fits, "a token", most if least >= 0 else least, f"0 to {config.vocab_size - 1}")
    layout = layout or device_layout(base.devices)
    order = sorted(range(len(passages)), key=lambda i: (-len(passages[i].tokens), passages[i].tokens))
    for start in range(0, len(order), rows):
        places = order[start : start + rows]
        group = [passages[i] for i in places]
        length = bucket_of(len(group[0].tokens) - 1, config.max_positions)
        # A partial batch repeats its last passage, because a row without a prompt has no route.
        batch, targets = _collate([*group, *[group[-1]] * (rows - len(group))], length)
        forced = None
        if routes is not None:
            filled = routes[[*places, *[places[-1]] * (rows - len(group))]]
            forced = tuple(filled[:, None, layer] for layer in range(config.num_layers))
        sums, greedy = to_host(
            score(base, adapter, place_rows(batch, layout), targets, forced, config=config, layout=layout)
        )
        yield {i: Likelihood(float(sums[n]), bool(greedy[n])) for n, i in enumerate(places)}


def _collate(passages: Sequence[Passage], length: int) -> tuple[Batch, np.ndarray]:
    """Passages without their last tokens as rows, and the next tokens, ``[B, T]``; on the host."""
    shape = (len(passages), length)
    tokens, targets, segments = (np.zeros(shape, np.int32) for _ in range(3))
    prompt, scored = np.zeros(shape, bool), np.zeros(shape, bool)
    for row, passage in enumerate(passages):
        size = len(passage.tokens) - 1
        tokens[row, :size], targets[row, :size] = passage.tokens[:-1], passage.tokens[1:]
        segments[row, :size] = 1
        prompt[row, : passage.prompt] = True
        scored[row, size - passage.scored : size] = True
    fields: dict[str, Any] = {
        "tokens": tokens,
        "segment_ids": segments,
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), shape) * segments,
        "prompt_mask": prompt,
        "loss_mask": scored,
    }
    return Batch(**fields), targets


@functools.partial(jax.jit, static_argnames=("config", "layout"))
def score(
    base: Base,
    adapter: Adapter | None,
    batch: Batch,
    targets: Int[Array, "B T"],
    routes: tuple[Float[Array, "B 1 E"], ...] | None = None,
    *,
    config: ModelConfig,
    layout: DeviceLayout | None = None,
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """For each row, the log-probability of the targets where ``batch.loss_mask`` is true, in nats, and
    whether each of them is the most probable token.

    Args:
      targets: the token that each token must predict.
      routes: routing weights of each layer; None lets the adapter's routers choose.
    """
    output = forward(
        base,
        config,
        batch,
        adapter=adapter,
        route=routes,
        attend=functools.partial(attention, layout=layout),
    )
    rows, length = targets.shape
    width = max(1, min(length, CHUNK // rows))
    chunks = -(-length // width)
    padding = ((0, 0), (0, chunks * width - length))

    def in_chunks(array: Array) -> Array:
        padded = jnp.pad(array, padding + ((0, 0),) * (array.ndim - 2))
        return padded.reshape(rows, chunks, width, *array.shape[2:]).swapaxes(0, 1)

    def of_chunk(hidden: Array, wanted: Array, counted: Array) -> tuple[Array, Array]:
        logits = unembed(base, config, hidden)
        chosen = jnp.take_along_axis(logits, wanted[..., None], axis=-1, mode="clip")[..., 0]
        losses = jnp.where(counted, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0)
        best = (jnp.argmax(logits, axis=-1).astype(wanted.dtype) == wanted) | ~counted
        return losses.sum(axis=1), best.all(axis=1)

    def of_nothing(hidden: Array, wanted: Array, counted: Array) -> tuple[Array, Array]:
        return jnp.zeros(rows, jnp.float32), jnp.ones(rows, bool)

    def add(carry: tuple[Array, Array], chunk: tuple) -> tuple[tuple[Array, Array], None]:
        # Most tokens are context, whose logits are not computed.
        losses, best = jax.lax.cond(chunk[2].any(), of_chunk, of_nothing, *chunk)
        return (carry[0] - losses, carry[1] & best), None

    start = (jnp.zeros(rows, jnp.float32), jnp.ones(rows, bool))
    (sums, greedy), _ = jax.lax.scan(
        add, start, (in_chunks(output.hidden), in_chunks(targets), in_chunks(batch.loss_mask))
    )
    return sums, greedy
