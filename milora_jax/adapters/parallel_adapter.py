"""Parallel-Adapter: a ReLU bottleneck beside attention and feed-forward (He et al. 2022, arXiv 2110.04366).

It reads the input of the sublayer, the normed residual stream, and is added to the sublayer's output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax

from milora_jax.adapters.bottleneck import Bottleneck, init_branches
from milora_jax.adapters.inputs import Kernels, Shape
from milora_jax.adapters.protocol import WidthMethod
from milora_jax.shapes import Array, Float, Key


@dataclass(frozen=True)
class ParallelAdapter(WidthMethod):
    """Parallel-Adapter; ``width`` is the width of the bottleneck."""

    name: ClassVar[str] = "parallel_adapter"
    additive: ClassVar[bool] = True
    width: int = 160

    def init(self, key: Key[Array, ""], shape: Shape, kernels: Kernels) -> dict[str, Bottleneck]:
        """Make two bottlenecks per layer that add nothing yet."""
        del kernels
        return init_branches(key, shape, self.width, learned=False)

    def branch(
        self, params: dict[str, Bottleneck], sublayer: str, x: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """``ReLU(x W_down) W_up``."""
        mine = params[sublayer]
        return jax.nn.relu(x @ mine.reduce.astype(x.dtype)) @ mine.expand.astype(x.dtype)
