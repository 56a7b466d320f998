"""DoRA: magnitude and direction apart (Liu et al. 2024, arXiv 2402.09353).

A module's weight becomes ``m * (W + s A B) / n``, with one magnitude m per output and n the column
norms of ``W + s A B``. The gradient does not pass through n (section 4.3 of that paper, and PEFT).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from milora_jax.adapters.inputs import FrozenLayer, Kernels, ProjectionGroup, Shape
from milora_jax.adapters.joined import Joined, filled, join
from milora_jax.adapters.low_rank import add, drop, init_pairs, narrow, widen
from milora_jax.adapters.protocol import Method
from milora_jax.adapters.records import Decomposed, LowRank, WeightChange
from milora_jax.adapters.targets import TargetedMethod, adapt_part
from milora_jax.shapes import Array, Float, Key
from milora_jax.types import EXPERTS, GROUPS, kept


@struct.dataclass
class JoinedDecomposed:
    """One layer's DoRA in the form that decoding reads, with the norms computed once.

    Attributes:
      pairs: the joined pairs, each column of B times its ratio m/n.
      stretch: m/n - 1 for every output of every module.
    """

    pairs: Joined
    stretch: dict[str, Float[Array, " d_out"]]


def init_decomposed(
    key: Key[Array, ""], shape: Shape, rank: int, kernels: Kernels, modules: Sequence[str] = EXPERTS
) -> dict[str, Decomposed]:
    """Make LoRA's pairs, and magnitudes equal to :func:`column_norms` while B is zero."""
    return {
        name: Decomposed(pair.a, pair.b, _root(jnp.sum(kernels[name].astype(jnp.float32) ** 2, axis=-2)))
        for name, pair in init_pairs(key, shape, rank, modules).items()
    }


def column_norms(
    kernel: Float[Array, "d_in d_out"],
    a: Float[Array, "d_in R"],
    b: Float[Array, "R d_out"],
    scale: float,
) -> Float[Array, " d_out"]:
    """Euclidean norm of every column of ``W + s A B`` in float32, without forming the product.

    ``|w + s A b|^2 = |w|^2 + 2 s (A^T w) . b + s^2 b . (A^T A) b`` for a column w and its b.
    """
    kernel, highest = kernel.astype(jnp.float32), jax.lax.Precision.HIGHEST
    cross = jnp.einsum("ir,io->ro", a, kernel, precision=highest)
    inner = jnp.einsum("ir,is->rs", a, a, precision=highest)
    square = jnp.einsum("rs,so->ro", inner, b, precision=highest)
    squares = jnp.sum(kernel**2, axis=0) + jnp.sum(b * (2.0 * scale * cross + scale**2 * square), axis=0)
    return _root(squares)


def _root(squares: Float[Array, "*L d_out"]) -> Float[Array, "*L d_out"]:
    """The square root, and at least a tiny number, because a magnitude is divided by it."""
    return jnp.sqrt(jnp.maximum(squares, jnp.finfo(jnp.float32).tiny))


def join_decomposed(
    params: dict[str, Decomposed], frozen: FrozenLayer, scale: float, dtype: jnp.dtype
) -> JoinedDecomposed:
    """Join the pairs and compute the ratios m/n, which are constants once W, A, B and m are fixed.

    A module without a pair has the ratio 1 and a pair of zeros.
    """
    ratios = {}
    for place, names in enumerate(GROUPS):
        for name, leaves in zip(names, frozen(place), strict=True):
            pair = params.get(name)
            if pair is None:
                ratios[name] = jnp.ones(leaves.kernel.shape[-1], jnp.float32)
                continue
            ratios[name] = pair.magnitude / column_norms(leaves.kernel, pair.a, pair.b, scale)
    pairs = {name: LowRank(pair.a, pair.b * ratios[name][None]) for name, pair in params.items()}
    return JoinedDecomposed(
        pairs=join(filled(pairs, frozen), scale, dtype),
        stretch={name: (ratio - 1.0).astype(dtype) for name, ratio in ratios.items()},
    )


def decomposed_changes(
    params: dict[str, Decomposed] | JoinedDecomposed, group: ProjectionGroup, scale: float, dropout: float
) -> tuple[Float[Array, "B T _"], ...]:
    """The change of every module's output: ``(m/n - 1) x W + (m/n) s x A B``.

    With dropout, both terms read the dropped input and the base's output stays whole, as in PEFT. The base's
    bias is not scaled.
    """
    if isinstance(params, JoinedDecomposed):
        products = params.pairs.changes(group.names, group.x)
        wholes = _without_bias(group)
        return tuple(
            params.stretch[name][None, None] * whole + product
            for name, whole, product in zip(group.names, wholes, products, strict=True)
        )
    dropping = group.key is not None and dropout > 0
    x = drop(group.x, dropout, group.key)
    products = widen(params, group.names, narrow(params, group.names, x) * scale)
    changes = []
    # The gradient of m reads them: unless kept, the backward pass would compute the frozen product again.
    wholes = kept(_without_bias(group))
    for name, whole, leaves, product in zip(group.names, wholes, group.frozen, products, strict=True):
        pair = params[name]
        a, b = jax.lax.stop_gradient((pair.a, pair.b))
        norms = kept(jax.lax.stop_gradient(column_norms(leaves.kernel, a, b, scale)))
        ratio = (pair.magnitude / norms)[None, None, :]
        plain = x @ leaves.kernel if dropping else whole
        changes.append((ratio - 1.0).astype(x.dtype) * plain + ratio.astype(x.dtype) * product)
    return tuple(changes)


def _without_bias(group: ProjectionGroup) -> list[Float[Array, "B T _"]]:
    """``x W`` of every module."""
    return [
        output if leaves.bias is None else output - leaves.bias[None, None, :]
        for output, leaves in zip(group.outputs, group.frozen, strict=True)
    ]


@dataclass(frozen=True)
class DoRA(TargetedMethod):
    """DoRA; it has the settings of every low-rank method, and a choice of modules."""

    name: ClassVar[str] = "dora"
    record: ClassVar[type | None] = Decomposed
    portable: ClassVar[bool] = True

    def init(self, key: Key[Array, ""], shape: Shape, kernels: Kernels) -> dict[str, Decomposed]:
        """Make one pair and one magnitude vector per chosen module and layer; only rounding changes the
        outputs.
        """
        return init_decomposed(key, shape, self.rank, kernels, self.modules)

    def prepare(
        self, params: dict[str, Decomposed], frozen: FrozenLayer, dtype: jnp.dtype
    ) -> JoinedDecomposed:
        """Join the pairs and compute the norms of the recomposed weights."""
        return join_decomposed(params, frozen, self.scale, dtype)

    def weight_change(self, params: dict[str, Decomposed]) -> WeightChange:
        """The pairs and magnitudes."""
        return WeightChange(params, self.scale, self.dropout, self.use_rslora)

    def served(self) -> Method:
        """The method without settings: the prepared pairs hold rank and scale, and dropout is off."""
        return DoRA()

    def adapt(
        self, params: dict[str, Decomposed] | JoinedDecomposed, group: ProjectionGroup
    ) -> tuple[Float[Array, "B T _"], ...]:
        """The outputs of the recomposed weights."""

        def adapt(part: ProjectionGroup) -> tuple[Float[Array, "B T _"], ...]:
            return add(part.outputs, decomposed_changes(params, part, self.scale, self.dropout))

        prepared = isinstance(params, JoinedDecomposed)
        return adapt(group) if prepared else adapt_part(group, self.modules, adapt)
