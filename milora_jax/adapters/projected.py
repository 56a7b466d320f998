"""Vectors that are tuned as ``z P``, a short vector and a projection, so that their size is a setting.

(IA)3 and BitFit by themselves tune a few thousand parameters. The MiLoRA paper (Appendix D) gives them the
budget of the other methods by projecting each vector from a shorter one: z of some width, P to the module's
output width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from milora_jax.adapters.inputs import Kernels, Shape
from milora_jax.adapters.protocol import WidthMethod
from milora_jax.shapes import Array, Float, Key


@struct.dataclass
class Projected:
    """One module's vector ``z P``, stacked over layers outside a layer.

    Attributes:
      vector: z, of unit expected length.
      projection: P, zero at the start, so that the product is zero.
    """

    vector: Float[Array, "*L W"]
    projection: Float[Array, "*L W d_out"]

    def product(self) -> Float[Array, " d_out"]:
        """``z P`` of one layer."""
        return jnp.einsum("W,WD->D", self.vector, self.projection)


@dataclass(frozen=True)
class ProjectedMethod(WidthMethod):
    """A method that tunes one vector ``z P`` per module; ``width`` is that of z."""

    modules: ClassVar[tuple[str, ...]] = ()
    """The modules that have a vector."""

    def init(self, key: Key[Array, ""], shape: Shape, kernels: Kernels) -> dict[str, Projected]:
        """Make one vector per module and layer, all of them zero."""
        del kernels
        layers, dims, width = shape.num_layers, shape.dims, self.width
        return {
            name: Projected(
                vector=width**-0.5 * jax.random.normal(module_key, (layers, width), jnp.float32),
                projection=jnp.zeros((layers, width, dims[name][1]), jnp.float32),
            )
            for module_key, name in zip(jax.random.split(key, len(self.modules)), self.modules, strict=True)
        }
