"""The gradient of a batch, computed whole or part by part.

Parts change memory, not the result: the losses and gradients of the parts sum to those of the whole batch.
The load-balance term multiplies two means over the batch (Eq. 4). The shares of first choices (Eq. 5) have no
gradient but must be known before the first part is differentiated, so a method with a router (and kto, whose
estimate of the divergence is that of the whole batch) needs one more forward pass over all parts: 2N
floating-point operations per token beside the 4N of a step on a frozen base of N parameters. The usual
approximation, a term per part, would change the loss with the number of parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from milora_jax.adapters.protocol import Adapter
from milora_jax.base.modules import Base
from milora_jax.shapes import Array, Int, Key
from milora_jax.training.loss import LossParts, Totals
from milora_jax.types import Batch, PyTree

Loss = Callable[[Adapter, Base, Batch, "Array | None", "Totals | None"], tuple[Array, LossParts]]
Routed = Callable[[Adapter, Base, Batch, "Array | None"], Totals]


def value_and_gradient(
    loss: Loss,
    routed: Routed,
    count: int,
    adapter_of: Callable[[PyTree], Adapter],
    params: PyTree,
    base: Base,
    batch: Batch,
    key: Key[Array, ""] | None,
) -> tuple[tuple[Array, LossParts], PyTree]:
    """The loss, its terms, and its gradient with respect to ``params``.

    Args:
      loss: ``(adapter, base, batch, key, totals) -> (loss, terms)``.
      routed: ``(adapter, base, batch, key) -> totals``; the shares of first choices cost a forward pass where
        the method routes.
      count: number of parts of the batch, a divisor of its rows.
      adapter_of: returns the adapter with ``params`` in it.
      key: random key of dropout, different in every part; None switches dropout off.
    """

    def of_part(params: PyTree, part: Batch, key: Array | None, totals: Totals | None) -> tuple:
        return loss(adapter_of(params), base, part, key, totals)

    differentiate = jax.value_and_grad(of_part, has_aux=True)
    if count == 1:
        return differentiate(params, batch, key, None)
    parts = divide(batch, count)
    totals = _totals(routed, adapter_of(params), base, parts, key)

    def add_part(sums: tuple, numbered: tuple) -> tuple:
        (value, terms), gradient = sums
        number, part = numbered
        (more, new), slope = differentiate(params, part, _key_of_part(key, number), totals)
        summed = jax.tree.map(jnp.add, terms, dataclasses.replace(new, route=None))
        terms = dataclasses.replace(summed, pooled_max=jnp.maximum(terms.pooled_max, new.pooled_max))
        return ((value + more, terms), jax.tree.map(jnp.add, gradient, slope)), None

    first = jax.tree.map(lambda leaf: leaf[0], parts)
    shapes = jax.eval_shape(lambda: differentiate(params, first, key, totals))
    (value, terms), gradient = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    start = (value, dataclasses.replace(terms, route=None)), gradient
    return jax.lax.scan(add_part, start, (jnp.arange(count), parts))[0]


def divide(batch: Batch, count: int) -> Batch:
    """Divide a batch into parts on a new leading axis.

    Row r goes to part ``r % count``: the devices over which the rows are divided take equal shares of every
    part, and no row moves between devices.
    """

    def of_leaf(leaf: Array) -> Array:
        return leaf.reshape(leaf.shape[0] // count, count, *leaf.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(of_leaf, batch)


def _key_of_part(key: Key[Array, ""] | None, number: Int[Array, ""]) -> Key[Array, ""] | None:
    return None if key is None else jax.random.fold_in(key, number)


def _totals(routed: Routed, adapter: Adapter, base: Base, parts: Batch, key: Array | None) -> Totals:
    """The totals of the whole batch, from those of its parts."""
    count = parts.tokens.shape[0]

    def of_part(numbered: tuple) -> Totals:
        number, part = numbered
        return routed(adapter, base, part, _key_of_part(key, number))

    found = jax.lax.map(of_part, (jnp.arange(count), parts))
    whole = Totals(
        tokens=found.tokens.sum(),
        prompts=found.prompts.sum(),
        first_choices=None,
        kl=None if found.kl is None else jax.lax.stop_gradient(found.kl.sum()),
        parts=count,
    )
    if found.first_choices is None:
        return whole
    weighed = found.first_choices * found.prompts.astype(jnp.float32)[:, None, None]
    first = weighed.sum(axis=0) / jnp.maximum(whole.prompts, 1).astype(jnp.float32)
    return dataclasses.replace(whole, first_choices=jax.lax.stop_gradient(first))
