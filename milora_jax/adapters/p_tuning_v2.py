"""P-tuning v2: tuned keys and values before those of every layer (Liu et al. 2022, arXiv 2110.07602).

The setting is that of the MiLoRA paper (Appendix D): 16 of them, each of dimension 640, projected to the
width of the keys and values. One projection serves both, which matches the paper's parameter count. The
prefix keys are not rotated and the tokens keep their positions. Any prefix takes attention from the tokens,
so a fresh one does change the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from milora_jax.adapters.inputs import Kernels, Project, Shape
from milora_jax.adapters.protocol import WidthMethod
from milora_jax.errors import require
from milora_jax.shapes import Array, Bool, Float, Key


@struct.dataclass
class Prefix:
    """The prefix of every layer.

    Attributes:
      key_vectors, value_vectors: short vectors of the keys and the values.
      projection: matrix from their width to that of the layer's keys and values, K * H.
    """

    key_vectors: Float[Array, "*L P W"]
    value_vectors: Float[Array, "*L P W"]
    projection: Float[Array, "*L W KH"]


@dataclass(frozen=True)
class PTuningV2(WidthMethod):
    """P-tuning v2; ``width`` is the width of the vectors that are projected.

    Attributes:
      tokens: P, the length of the prefix.
    """

    name: ClassVar[str] = "p_tuning_v2"
    additive: ClassVar[bool] = True
    width: int = 640
    tokens: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tokens >= 1, "adapter.tokens", self.tokens, "at least 1")

    @property
    def prefix_length(self) -> int:
        """P, the length of the prefix."""
        return self.tokens

    def init(self, key: Key[Array, ""], shape: Shape, kernels: Kernels) -> Prefix:
        """Draw vectors of unit variance, and a projection that keeps unit variance."""
        del kernels
        keys_key, values_key, projection_key = jax.random.split(key, 3)
        layers, wide = shape.num_layers, shape.dims["k"][1]
        size = (layers, self.tokens, self.width)
        return Prefix(
            key_vectors=jax.random.normal(keys_key, size, jnp.float32),
            value_vectors=jax.random.normal(values_key, size, jnp.float32),
            projection=self.width**-0.5
            * jax.random.normal(projection_key, (layers, self.width, wide), jnp.float32),
        )

    def prefix(
        self,
        params: Prefix,
        hidden: Float[Array, "B T D"],
        members: Bool[Array, "B Z T"],
        project: Project,
    ) -> tuple[Float[Array, "B ZP _"], Float[Array, "B ZP _"]]:
        """The same keys and values for every record."""
        del project
        rows, records, _ = members.shape

        def wide(short: Array) -> Array:
            one = jnp.einsum("PW,WK->PK", short, params.projection).astype(hidden.dtype)
            return jnp.broadcast_to(jnp.tile(one, (records, 1)), (rows, records * self.tokens, one.shape[-1]))

        return wide(params.key_vectors), wide(params.value_vectors)
