"""The change that an adapter makes to each frozen weight under one fixed route.

LoRA, methods that are decoded as LoRA, and DoRA change every weight in one way for all prompts. A MiLoRA does
so under one fixed route: the change of expert e of layer l is then multiplied by ``weights[l, e]``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from milora_jax.adapters.inputs import Shape
from milora_jax.adapters.lora import LoRA
from milora_jax.adapters.protocol import Adapter
from milora_jax.adapters.records import Decomposed, LowRank, WeightChange
from milora_jax.adapters.registry import METHOD_CLASSES
from milora_jax.errors import UserError
from milora_jax.shapes import Float
from milora_jax.types import EXPERTS

MERGED = (LowRank, Decomposed)
"""Records whose change can be added to a weight. Factors of outputs are not among them: they scale the bias
too, and a base need not have one."""


@dataclass(frozen=True)
class FixedChange:
    """One change of every weight, the same for all prompts.

    Attributes:
      change: the change that an adapter makes.
      weights: factor of each module's change; all ones without a route.
      shape: the shape of the base.
    """

    change: WeightChange
    weights: Float[np.ndarray, "L E"]
    shape: Shape

    def outputs(self, module: str) -> int:
        """Number of outputs of a module."""
        return self.shape.dims[module][1]

    def apply(
        self, layer: int, module: str, weight: Float[np.ndarray, "d_out d_in"]
    ) -> Float[np.ndarray, "d_out d_in"]:
        """The changed weight of a module, in float32.

        Args:
          weight: the frozen weight in the layout of files.
        """
        share = np.float32(self.weights[layer, EXPERTS.index(module)])
        frozen = np.asarray(weight, np.float32)
        if share == 0 or module not in self.change.records:
            return frozen
        return frozen + share * self.change.records[module].change(layer, frozen, self.change.scale)


def fixed_change(adapter: Adapter, weights: Float[np.ndarray, "L E"] | None = None) -> FixedChange:
    """The change that an adapter makes, under one route if its method routes.

    Args:
      adapter: in the stacked layout.
      weights: routing weights; given if and only if the method routes.

    Raises:
      UserError: the method is more than one change of each weight, or its route is missing.
    """
    method = adapter.method
    if method.record not in MERGED:
        expected = ", ".join(name for name, cls in METHOD_CLASSES.items() if cls.record in MERGED)
        raise UserError(
            f"method {method.name!r} is more than one change of each weight: expected one of {expected}"
        )
    if method.routes and weights is None:
        raise UserError(f"method {method.name!r} routes every prompt: a fixed route needs --calibration FILE")
    if weights is None:
        weights = np.ones((adapter.shape.num_layers, len(EXPERTS)), np.float32)
    return FixedChange(method.weight_change(adapter.params), weights, adapter.shape)


def static_lora(adapter: Adapter, weights: Float[np.ndarray, "L E"]) -> Adapter:
    """Convert a MiLoRA under one route to a LoRA: the weights are multiplied into B.

    Every module keeps its pair at full rank, with B zero in layers that never choose it, because readers of
    PEFT's files assume one rank for all.

    Raises:
      UserError: the experts are not plain pairs.
    """
    method = adapter.method
    if not (method.routes and method.record is LowRank):
        raise UserError(f"method {method.name!r} has no static route that is a LoRA: expected milora")
    change, share = method.weight_change(adapter.params), jnp.asarray(weights, jnp.float32)
    pairs = {
        name: dataclasses.replace(pair, b=pair.b * share[:, i, None, None])
        for i, (name, pair) in enumerate((name, change.records[name]) for name in EXPERTS)
    }
    lora = LoRA(rank=change.rank, alpha=change.scale * change.rank, dropout=change.dropout)
    return Adapter(pairs, lora, adapter.shape, adapter.prompt_format)
