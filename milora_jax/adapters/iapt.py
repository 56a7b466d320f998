"""IAPT: soft tokens that every layer makes from the prompt (Zhu et al. 2024, arXiv 2405.18203).

Its abstract names the parts of a generator: self-attention pooling, two linear projections, and an activation
learned as a rational function. The order and the rest are ours: reduce the prompt's hidden states, pool them
into soft tokens with one score vector each, activate, expand, and let the frozen layer make keys and values
of the result. A fresh prefix changes the outputs, as any prefix does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from milora_jax.adapters.bottleneck import Bottleneck, RationalMethod, init_bottleneck
from milora_jax.adapters.inputs import Kernels, Project, Shape
from milora_jax.errors import require
from milora_jax.shapes import Array, Bool, Float, Key


@struct.dataclass
class Generator:
    """The generator of soft tokens of every layer.

    Attributes:
      bottleneck: the two projections and the coefficients of the activation.
      scores: score vector of each soft token over the reduced states.
    """

    bottleneck: Bottleneck
    scores: Float[Array, "*L W P"]


@dataclass(frozen=True)
class IAPT(RationalMethod):
    """IAPT; ``width`` is the width of the bottleneck.

    Attributes:
      tokens: P, the number of soft tokens of a layer.
    """

    name: ClassVar[str] = "iapt"
    additive: ClassVar[bool] = True
    width: int = 320
    tokens: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tokens >= 1, "adapter.tokens", self.tokens, "at least 1")

    @property
    def prefix_length(self) -> int:
        """P, the number of soft tokens."""
        return self.tokens

    @property
    def reads_prompt(self) -> bool:
        """True: the soft tokens are made from it."""
        return True

    def init(self, key: Key[Array, ""], shape: Shape, kernels: Kernels) -> Generator:
        """Draw generators at random; the scores must differ, or all soft tokens would stay equal."""
        del kernels
        bottleneck_key, scores_key = jax.random.split(key)
        layers, width = shape.num_layers, self.width
        return Generator(
            bottleneck=init_bottleneck(bottleneck_key, layers, shape.hidden_size, width, True, zero=False),
            scores=width**-0.5 * jax.random.normal(scores_key, (layers, width, self.tokens), jnp.float32),
        )

    def prefix(
        self,
        params: Generator,
        hidden: Float[Array, "B T D"],
        members: Bool[Array, "B Z T"],
        project: Project,
    ) -> tuple[Float[Array, "B ZP _"], Float[Array, "B ZP _"]]:
        """Soft tokens from the prompt's hidden states, and the frozen layer's keys and values of them."""
        mine = params.bottleneck
        reduced = jnp.einsum("BTD,DW->BTW", hidden.astype(jnp.float32), mine.reduce)
        scores = jnp.einsum("BTW,WP->BPT", reduced, params.scores)
        # A record without a prompt gives finite tokens that nobody reads.
        scores = jnp.where(members[:, :, None, :], scores[:, None], jnp.finfo(jnp.float32).min)
        pooled = jnp.einsum("BZPT,BTW->BZPW", jax.nn.softmax(scores, axis=-1), reduced)
        soft = mine.activate(pooled) @ mine.expand
        return project(soft.reshape(soft.shape[0], -1, soft.shape[-1]).astype(hidden.dtype))
