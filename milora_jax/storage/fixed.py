"""What an adapter does to each frozen weight when nothing is chosen any more.

LoRA, what is decoded as LoRA, and DoRA change every weight in one way for all prompts. A MiLoRA does so
under one fixed route: expert e of layer l then changes its weight ``weights[l, e]`` times.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from milora_jax.adapters.lora import LoRA
from milora_jax.adapters.protocol import Adapter
from milora_jax.adapters.records import Decomposed, LowRank, WeightChange
from milora_jax.adapters.registry import METHOD_CLASSES
from milora_jax.errors import UserError
from milora_jax.shapes import Float
from milora_jax.types import EXPERTS

MERGED = (LowRank, Decomposed)
"""Records whose change can be added to a weight. Factors of outputs are not among them: they scale the bias,
too, which a base need not have."""


@dataclass(frozen=True)
class FixedChange:
    """One change of every weight.

    Attributes:
      change: of an adapter.
      weights: how many times each module's change acts; all ones without a route.
    """

    change: WeightChange
    weights: Float[np.ndarray, "L E"]

    def outputs(self, module: str) -> int:
        """Outputs of a module."""
        return self.change.records[module].b.shape[-1]

    def apply(
        self, layer: int, module: str, weight: Float[np.ndarray, "d_out d_in"]
    ) -> Float[np.ndarray, "d_out d_in"]:
        """The changed weight of a module, in float32.

        Args:
          weight: frozen, laid out as files hold it.
        """
        share = np.float32(self.weights[layer, EXPERTS.index(module)])
        frozen = np.asarray(weight, np.float32)
        if share == 0:
            return frozen
        return frozen + share * self.change.records[module].change(layer, frozen, self.change.scale)


def fixed_change(adapter: Adapter, weights: Float[np.ndarray, "L E"] | None = None) -> FixedChange:
    """The change that an adapter makes, of a method that routes under one route.

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
    return FixedChange(method.weight_change(adapter.params), weights)


def static_lora(adapter: Adapter, weights: Float[np.ndarray, "L E"]) -> Adapter:
    """The LoRA that a MiLoRA is under one route: the weights are folded into B.

    Every module keeps its pair at the full rank, in layers that never choose it with a B of zero: readers
    of PEFT's files take one rank for all.

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
