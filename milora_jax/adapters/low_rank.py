"""Low-rank pairs ``x A B``: the expert of MiLoRA and the whole of LoRA (paper, Eq. 1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from milora_jax.adapters.protocol import Shape
from milora_jax.shapes import Array, Float, Key
from milora_jax.types import EXPERTS


@struct.dataclass
class LowRank:
    """One module's pair, stacked over layers outside a layer.

    Attributes:
      a: input side W_A.
      b: output side W_B, zero at the start so that the pair changes nothing.
    """

    a: Float[Array, "*L d_in R"]
    b: Float[Array, "*L R d_out"]


def init_pairs(key: Key[Array, ""], shape: Shape, rank: int) -> dict[str, LowRank]:
    """Pairs of all seven modules: A uniform in +-1/sqrt(d_in) as PEFT draws it, B zero."""
    pairs = {}
    for module_key, (name, (d_in, d_out)) in zip(jax.random.split(key, 7), shape.modules, strict=True):
        bound = d_in**-0.5
        a = jax.random.uniform(module_key, (shape.num_layers, d_in, rank), jnp.float32, -bound, bound)
        pairs[name] = LowRank(a=a, b=jnp.zeros((shape.num_layers, rank, d_out), jnp.float32))
    return pairs


def add_low_rank(
    pairs: dict[str, LowRank],
    names: tuple[str, ...],
    x: Float[Array, "B T d_in"],
    outputs: tuple[Float[Array, "B T _"], ...],
    weights: Float[Array, "B _ E"] | None,
    scale: float,
    dropout: float,
    key: Key[Array, ""] | None,
) -> tuple[Float[Array, "B T _"], ...]:
    """``outputs[i] + scale * weight_i * (x A_i) B_i`` for the modules of one group.

    The A matrices of a group are one matmul. Scale and routing weight multiply its R-wide result,
    not the wide output. ``weights=None`` means weight 1 everywhere.
    """
    if key is not None and dropout > 0:
        kept = jax.random.bernoulli(key, 1.0 - dropout, x.shape)
        x = jnp.where(kept, x / (1.0 - dropout), jnp.zeros_like(x))
    rank = pairs[names[0]].a.shape[-1]
    a = jnp.concatenate([pairs[name].a for name in names], axis=-1).astype(x.dtype)
    u = x @ a
    u = u.reshape(*x.shape[:-1], len(names), rank) * scale
    if weights is not None:
        chosen = weights[..., [EXPERTS.index(name) for name in names]]
        u = u * chosen[..., None].astype(u.dtype)
    return tuple(
        output + u[..., i, :] @ pairs[name].b.astype(x.dtype)
        for i, (name, output) in enumerate(zip(names, outputs, strict=True))
    )
