"""The trainable leaves of one module that change its weight, and the change of all weights.

A record is a dataclass of leaves that are stacked over layers outside a layer. Exports name its tensors by
its fields (``storage.pair_tensors``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from flax import struct

from milora_jax.shapes import Array, Float


@struct.dataclass
class LowRank:
    """One module's low-rank pair: ``W + s (A B)^T`` (paper, Eq. 1).

    Attributes:
      a: input side W_A.
      b: output side W_B, zero at the start so that the pair changes nothing.
    """

    a: Float[Array, "*L d_in R"]
    b: Float[Array, "*L R d_out"]

    def change(
        self, layer: int, weight: Float[np.ndarray, "d_out d_in"], scale: float
    ) -> Float[np.ndarray, "d_out d_in"]:
        """The change of a frozen weight, in float32.

        Args:
          weight: in the layout of files.
        """
        del weight
        return _product(self, layer, scale)


@struct.dataclass
class Decomposed:
    """One module's pair and magnitude (DoRA): ``m V / n`` with ``V = W + s (A B)^T`` and n the norms of V's
    rows.

    Attributes:
      a, b: the low-rank pair.
      magnitude: m, at the start the norms of the frozen weight's rows.
    """

    a: Float[Array, "*L d_in R"]
    b: Float[Array, "*L R d_out"]
    magnitude: Float[Array, "*L d_out"]

    def change(
        self, layer: int, weight: Float[np.ndarray, "d_out d_in"], scale: float
    ) -> Float[np.ndarray, "d_out d_in"]:
        """The change of a frozen weight; see :meth:`LowRank.change`."""
        whole = weight + _product(self, layer, scale)
        ratio = np.asarray(self.magnitude[layer]) / np.linalg.norm(whole, axis=1)
        return ratio[:, None] * whole - weight


@struct.dataclass
class Rescaled:
    """Factors of one module's outputs, its bias included ((IA)3).

    Attributes:
      factor: factor of each output.
    """

    factor: Float[Array, "*L d_out"]


Record: TypeAlias = LowRank | Decomposed | Rescaled


@dataclass(frozen=True)
class WeightChange:
    """A change of weights, module by module.

    Attributes:
      records: one for every module that is changed, stacked over layers.
      scale: factor of low-rank products.
      dropout: share of their input that was dropped in training.
      use_rslora: whether the scale is an alpha over the root of the rank; the scale already says so.
    """

    records: Mapping[str, Any]
    scale: float = 1.0
    dropout: float = 0.0
    use_rslora: bool = False

    @property
    def rank(self) -> int:
        """R, the rank of the pairs."""
        return next(iter(self.records.values())).a.shape[-1]


class Parts(NamedTuple):
    """The content of an adapter's portable form.

    Attributes:
      records: one for each module that is changed, stacked over layers.
      router: ``adapters.router.RouterParams``; None for a method that does not route.
    """

    records: Mapping[str, Any]
    router: Any


def _product(pair: LowRank | Decomposed, layer: int, scale: float) -> Float[np.ndarray, "d_out d_in"]:
    a, b = (np.asarray(leaf[layer], np.float32) for leaf in (pair.a, pair.b))
    return np.float32(scale) * (a @ b).T
