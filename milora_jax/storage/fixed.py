"""What an adapter does to each frozen weight when nothing is chosen any more.

LoRA, what is decoded as LoRA, and DoRA change every weight in one way for all prompts. A MiLoRA does so
under one fixed route: expert e of layer l then changes its weight ``weights[l, e]`` times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from milora_jax.adapters.dora import Decomposed, DoRA
from milora_jax.adapters.lora import LoRA, TunedPairs
from milora_jax.adapters.milora import MiLoRA
from milora_jax.adapters.protocol import Adapter
from milora_jax.errors import UserError
from milora_jax.shapes import Float
from milora_jax.storage.pair_tensors import Record
from milora_jax.types import EXPERTS, stack_layers, unstack_layers

FIXED = (TunedPairs, DoRA)
"""Methods that make one change of every weight, whatever the prompt."""


@dataclass(frozen=True)
class FixedChange:
    """One change of every weight.

    Attributes:
      pairs: of every module, stacked over layers.
      scale: what their products are multiplied by.
      weights: how many times each module's change acts; all ones without a route.
    """

    pairs: Mapping[str, Record]
    scale: float
    weights: Float[np.ndarray, "L E"]

    def outputs(self, module: str) -> int:
        """Outputs of a module."""
        return self.pairs[module].b.shape[-1]

    def apply(
        self, layer: int, module: str, weight: Float[np.ndarray, "d_out d_in"]
    ) -> Float[np.ndarray, "d_out d_in"]:
        """The changed weight of a module, in float32: ``W + w s (A B)^T``, or of DoRA
        ``W + w (m V / n - W)`` with ``V = W + s (A B)^T`` and n the norms of V's rows.

        Args:
          weight: frozen, laid out as files hold it.
        """
        share = np.float32(self.weights[layer, EXPERTS.index(module)])
        frozen = np.asarray(weight, np.float32)
        if share == 0:
            return frozen
        record = self.pairs[module]
        a, b = (np.asarray(leaf[layer], np.float32) for leaf in (record.a, record.b))
        change = np.float32(self.scale) * (a @ b).T
        if isinstance(record, Decomposed):
            whole = frozen + change
            ratio = np.asarray(record.magnitude[layer]) / np.linalg.norm(whole, axis=1)
            change = ratio[:, None] * whole - frozen
        return frozen + share * change


def fixed_change(adapter: Adapter, weights: Float[np.ndarray, "L E"] | None = None) -> FixedChange:
    """The change that an adapter makes, of a method that routes under one route.

    Args:
      adapter: in the stacked layout.
      weights: routing weights; given if and only if the method routes.

    Raises:
      UserError: the method is more than one change of each weight, or its route is missing.
    """
    method, params = adapter.method, adapter.params
    if isinstance(method, MiLoRA):
        if weights is None:
            raise UserError(
                f"method {method.name!r} routes every prompt: a fixed route needs --calibration FILE"
            )
        return FixedChange(params.experts, method.scale, weights)
    ones = np.ones((adapter.shape.num_layers, len(EXPERTS)), np.float32)
    if isinstance(method, TunedPairs):
        folded = stack_layers(tuple(map(method.folded, unstack_layers(method.settle(params)))))
        return FixedChange(folded, method.scale, ones)
    if isinstance(method, DoRA):
        return FixedChange(params, method.scale, ones)
    expected = "lora, dora, adalora, ssp, milora, midora"
    raise UserError(
        f"method {method.name!r} is more than one change of each weight: expected one of {expected}"
    )


def static_lora(adapter: Adapter, weights: Float[np.ndarray, "L E"]) -> Adapter:
    """The LoRA that a MiLoRA is under one route: the weights are folded into B.

    Every module keeps its pair at the full rank, in layers that never choose it with a B of zero: readers
    of PEFT's files take one rank for all.

    Raises:
      UserError: the experts are not plain pairs.
    """
    method = adapter.method
    if not isinstance(method, MiLoRA) or method.name != "milora":
        raise UserError(f"method {method.name!r} has no static route that is a LoRA: expected milora")
    share = jnp.asarray(weights, jnp.float32)
    pairs = {
        name: dataclasses.replace(pair, b=pair.b * share[:, i, None, None])
        for i, (name, pair) in enumerate((name, adapter.params.experts[name]) for name in EXPERTS)
    }
    lora = LoRA(rank=method.rank, alpha=method.alpha, dropout=method.dropout)
    return Adapter(pairs, lora, adapter.shape, adapter.prompt_format)
