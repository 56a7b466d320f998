"""Cross entropy over a vocabulary, without the logits of all tokens in memory at once.

The logits of all tokens are the largest array of a plain training step: 1.6 GB for 16 x 768 tokens of LLaMA-2
in float32, and their gradient as much again. The head is frozen, so the backward pass needs only the gradient
with respect to the hidden states, which is computed chunk by chunk while the chunk's logits are there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from milora_jax.base.modules import Base
from milora_jax.base.ops import softcap, softcap_slope
from milora_jax.model_config import ModelConfig
from milora_jax.shapes import Array, Bool, Float, Int


def summed_cross_entropy(
    base: Base,
    config: ModelConfig,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    counted: Bool[Array, "B T"],
    chunk: int,
) -> Float[Array, ""]:
    """Sum of the negative log-likelihoods of the counted targets, in nats, in float32.

    The base gets no gradient.

    Args:
      hidden: normed residual stream.
      targets: the token that each hidden state predicts.
      chunk: least number of tokens whose logits are in memory at a time; it takes the same number from every
        row, so that a chunk is divided over devices as the batch is.
    """
    rows, length, _ = hidden.shape
    in_chunks = _chunked(rows, length, chunk)
    of_logits, head = _head_of(base, config)
    return _summed(of_logits, in_chunks(hidden), head, in_chunks(targets), in_chunks(counted))


def token_cross_entropy(
    base: Base,
    config: ModelConfig,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    counted: Bool[Array, "B T"],
    chunk: int,
) -> Float[Array, "B T"]:
    """The negative log-likelihood of each counted target, in nats, in float32; 0 where none is counted.

    The arguments are those of :func:`summed_cross_entropy`. The gradient with respect to the hidden states is
    kept from the forward pass, one vector a token, and scaled by each token's own slope in the backward pass.
    """
    rows, length, _ = hidden.shape
    in_chunks = _chunked(rows, length, chunk)
    of_logits, head = _head_of(base, config)
    losses: Any = _each(of_logits, in_chunks(hidden), head, in_chunks(targets), in_chunks(counted))
    return jnp.swapaxes(losses, 0, 1).reshape(rows, -1)[:, :length]


def _chunked(rows: int, length: int, chunk: int) -> Callable[[Array], Array]:
    """Divides the tokens of all rows into chunks on a new leading axis, padded with zeros."""
    chunks = max(1, rows * length // chunk)
    width = -(-length // chunks)
    padding = ((0, 0), (0, chunks * width - length))

    def in_chunks(array: Array) -> Array:
        padded = jnp.pad(array, padding + ((0, 0),) * (array.ndim - 2))
        return padded.reshape(rows, chunks, width, *array.shape[2:]).swapaxes(0, 1)

    return in_chunks


def _head_of(base: Base, config: ModelConfig) -> tuple[_OfLogits, Array]:
    of_logits = _OfLogits(base.head is None, config.final_softcap)
    return of_logits, base.embedding[...] if base.head is None else base.head[...]


@dataclass(frozen=True)
class _OfLogits:
    """The computation of logits from hidden states.

    Attributes:
      tied: whether the head is the embedding, ``[V, D]``.
      cap: cap of the logits, see ``ops.softcap``.
    """

    tied: bool
    cap: float | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(
    of_logits: _OfLogits,
    hidden: Float[Array, "C B W D"],
    head: Float[Array, "_ _"],
    targets: Int[Array, "C B W"],
    counted: Bool[Array, "C B W"],
) -> Float[Array, ""]:
    def of_chunk(total: Array, chunk: tuple) -> tuple[Array, None]:
        losses, _, _ = _chunk_losses(of_logits, head, *chunk)
        return total + losses.sum(), None

    return jax.lax.scan(of_chunk, jnp.zeros((), jnp.float32), (hidden, targets, counted))[0]


def _chunk_losses(
    of_logits: _OfLogits, head: Array, hidden: Array, targets: Array, counted: Array
) -> tuple[Array, Array, Array]:
    """The losses of a chunk's tokens, and its logits with the logarithm of their normaliser."""
    product = "BWD,VD->BWV" if of_logits.tied else "BWD,DV->BWV"
    logits = jnp.einsum(product, hidden, head, preferred_element_type=jnp.float32)
    logits = softcap(logits, of_logits.cap)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="clip")[..., 0]
    return jnp.where(counted, normaliser - chosen, 0.0), logits, normaliser


def _chunk_slopes(
    of_logits: _OfLogits, head: Array, states: Array, wanted: Array, counts: Array
) -> tuple[Array, Array]:
    """The losses of a chunk's tokens, and the gradient of each with respect to its hidden state."""
    back = "BWV,VD->BWD" if of_logits.tied else "BWV,DV->BWD"
    losses, logits, normaliser = _chunk_losses(of_logits, head, states, wanted, counts)
    at_target = jax.lax.broadcasted_iota(wanted.dtype, logits.shape, 2) == wanted[..., None]
    # exp(logit - normaliser) is the softmax: the gradient, minus one at the target.
    shares = jnp.exp(logits - normaliser[..., None]) - at_target.astype(jnp.float32)
    shares = shares * softcap_slope(logits, of_logits.cap)
    slope = jnp.where(counts[..., None], shares, 0.0).astype(head.dtype)
    gradient = jnp.einsum(back, slope, head, preferred_element_type=jnp.float32)
    return losses, gradient.astype(states.dtype)


def _forward(of_logits: _OfLogits, hidden: Array, head: Array, targets: Array, counted: Array) -> tuple:
    def of_chunk(total: Array, chunk: tuple) -> tuple[Array, Array]:
        losses, gradient = _chunk_slopes(of_logits, head, *chunk)
        return total + losses.sum(), gradient

    start = jnp.zeros((), jnp.float32)
    return jax.lax.scan(of_chunk, start, (hidden, targets, counted))


def _backward(of_logits: _OfLogits, gradient: Float[Array, "C B W D"], slope: Float[Array, ""]) -> tuple:
    del of_logits
    return (gradient * slope.astype(gradient.dtype), None, None, None)


_summed.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _each(
    of_logits: _OfLogits,
    hidden: Float[Array, "C B W D"],
    head: Float[Array, "_ _"],
    targets: Int[Array, "C B W"],
    counted: Bool[Array, "C B W"],
) -> Float[Array, "C B W"]:
    return jax.lax.map(lambda chunk: _chunk_losses(of_logits, head, *chunk)[0], (hidden, targets, counted))


def _forward_each(of_logits: _OfLogits, hidden: Array, head: Array, targets: Array, counted: Array) -> tuple:
    return jax.lax.map(lambda chunk: _chunk_slopes(of_logits, head, *chunk), (hidden, targets, counted))


def _backward_each(
    of_logits: _OfLogits, gradient: Float[Array, "C B W D"], slopes: Float[Array, "C B W"]
) -> tuple:
    del of_logits
    return ((gradient.astype(jnp.float32) * slopes[..., None]).astype(gradient.dtype), None, None, None)


_each.defvjp(_forward_each, _backward_each)
