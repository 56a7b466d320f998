"""Learned-Adapter: a Parallel-Adapter whose activations are learned rational functions, one per bottleneck.

We have read no code of it. Ours has the placement of the MiLoRA paper (Appendix D) and that paper's
rational function (Eq. 6), whose coefficients are trained like those of MiLoRA's router.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from milora_jax.adapters.bottleneck import Bottleneck, RationalMethod, init_branches
from milora_jax.adapters.inputs import Kernels, Shape
from milora_jax.shapes import Array, Float, Key


@dataclass(frozen=True)
class LearnedAdapter(RationalMethod):
    """Learned-Adapter; ``width`` is the width of the bottleneck."""

    name: ClassVar[str] = "learned_adapter"
    additive: ClassVar[bool] = True
    width: int = 160

    def init(self, key: Key[Array, ""], shape: Shape, kernels: Kernels) -> dict[str, Bottleneck]:
        """Make two bottlenecks per layer that add nothing yet, with activations near GELU."""
        del kernels
        return init_branches(key, shape, self.width, learned=True)

    def branch(
        self, params: dict[str, Bottleneck], sublayer: str, x: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """``Ra(x W_down) W_up``."""
        mine = params[sublayer]
        inner = mine.activate(x @ mine.reduce.astype(x.dtype))
        return inner.astype(x.dtype) @ mine.expand.astype(x.dtype)
