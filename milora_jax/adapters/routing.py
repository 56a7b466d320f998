"""The values that pass between the Transformer, the training step and a method that routes."""

from __future__ import annotations

from typing import NamedTuple

from milora_jax.shapes import Array, Bool, Float, Int


class LayerInput(NamedTuple):
    """What enters a layer, as a method may read it before the layer runs.

    Attributes:
      hidden: residual stream before the layer.
      normed: the same behind the layer's own input norm, where the family has one there.
      members: which tokens are the prompt of which record; a router looks at no others.
      depth: layer index over L, in [0, 1).
    """

    hidden: Float[Array, "B T D"]
    normed: Float[Array, "B T D"]
    members: Bool[Array, "B Z T"]
    depth: Float[Array, ""]


class RoutingSchedule(NamedTuple):
    """What routing settings are at one step of training, where they change in the course of it.

    Attributes:
      top_k: experts in force; None is the method's own number, and compiles to it.
      load_balance: lambda, the weight of Eq. 4.
    """

    top_k: Int[Array, ""] | None
    load_balance: Float[Array, ""] | float


class ExpertUse(NamedTuple):
    """How the prompts of a training batch used the experts of each layer.

    Attributes:
      chosen: share of the prompts whose route holds the expert.
      first: share of the prompts for which it is the most probable one, ``f_i`` of Eq. 5.
      features: mean over the prompts of the standardized features, and of their squares; None with others.
    """

    chosen: Float[Array, "L E"]
    first: Float[Array, "L E"]
    features: Float[Array, "L 2 D"] | None = None
