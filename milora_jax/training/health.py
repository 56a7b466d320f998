"""Is the router healthy? What a dev evaluation tells about the routes of the dev prompts."""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from milora_jax.shapes import Bool, Float
from milora_jax.types import EXPERTS

TAKEOVER = 0.5
"""Share of all (layer, dev prompt) pairs for which one expert is the most probable, from which on it
has taken over. Balanced routers give 1/7 of them to each expert."""

COLLAPSE = 0.9
"""Mean probability of one expert in a layer, from which on the layer's router says one thing only."""


@dataclass(frozen=True)
class RoutingHealth:
    """The routes of all dev prompts at one evaluation.

    Attributes:
      share: of the prompts that chose each expert.
      entropy: of the router's softmax in nats, mean over prompts; at most log 7 = 1.95.
      margin: by how much the k-th most probable expert was ahead of the next, mean over prompts; null
        where k is 7.
      probability: of each expert, mean over prompts.
      first: share of the prompts for which each expert is the most probable.
      changed: share of (layer, prompt) pairs whose chosen set differs from the last evaluation's; None
        at the first.
    """

    share: Float[np.ndarray, "L E"]
    entropy: Float[np.ndarray, " L"]
    margin: Float[np.ndarray, " L"] | None
    probability: Float[np.ndarray, "L E"]
    first: Float[np.ndarray, "L E"]
    changed: float | None

    def to_json(self) -> dict[str, Any]:
        """Fields for ``metrics.jsonl``."""
        return {
            "expert_share": self.share.round(4).tolist(),
            "route_entropy": self.entropy.round(4).tolist(),
            "route_margin": None if self.margin is None else self.margin.round(4).tolist(),
            "expert_first": self.first.round(4).tolist(),
            "route_changed": self.changed,
        }

    def warning(self) -> str | None:
        """One line if an expert has taken over, everywhere or in some layers, else None."""
        by_expert = self.first.mean(axis=0)
        leader = int(by_expert.argmax())
        if by_expert[leader] >= TAKEOVER:
            what = (
                f"expert {EXPERTS[leader]} is the first choice in {by_expert[leader]:.0%} of all layers and "
                "dev prompts (balanced: 14%)"
            )
        else:
            layers = np.flatnonzero(self.probability.max(axis=1) >= COLLAPSE)
            if not layers.size:
                return None
            said = ", ".join(f"{EXPERTS[self.probability[i].argmax()]} in layer {i}" for i in layers)
            what = f"one expert holds {COLLAPSE:.0%} or more of the probability: {said}"
        return f"routing: {what}; a larger adapter.load_balance spreads the choice"


def routing_health(
    probs: Float[np.ndarray, "L N E"],
    chosen: Bool[np.ndarray, "L N E"],
    before: Bool[np.ndarray, "L M E"] | None,
) -> RoutingHealth:
    """Measure the routes of N prompts.

    Args:
      probs: router softmax.
      chosen: the experts in force, k of them everywhere.
      before: ``chosen`` at the last evaluation; None if there was none. Of other dev rows it tells nothing.
    """
    top_k = int(chosen[0, 0].sum())
    falling = -np.sort(-probs, axis=-1)
    plogp = np.where(probs > 0, probs * np.log(np.maximum(probs, 1e-30)), 0.0)
    first = np.eye(probs.shape[-1])[probs.argmax(axis=-1)]
    comparable = before is not None and before.shape == chosen.shape
    return RoutingHealth(
        share=chosen.mean(axis=1),
        entropy=-plogp.sum(axis=-1).mean(axis=1),
        margin=(falling[..., top_k - 1] - falling[..., top_k]).mean(axis=1)
        if top_k < probs.shape[-1]
        else None,
        probability=probs.mean(axis=1),
        first=first.mean(axis=1),
        changed=float((before != chosen).any(axis=-1).mean()) if comparable else None,
    )


def pack_routes(chosen: Bool[np.ndarray, "L N E"]) -> str:
    """Chosen sets as a short string, for a checkpoint's metadata; :func:`unpack_routes` is the inverse."""
    shape = ",".join(map(str, chosen.shape))
    return f"{shape}:{base64.b85encode(zlib.compress(np.packbits(chosen).tobytes())).decode()}"


def unpack_routes(packed: str) -> Bool[np.ndarray, "L N E"]:
    """Inverse of :func:`pack_routes`."""
    head, body = packed.split(":", 1)
    shape = tuple(int(size) for size in head.split(","))
    bits = np.frombuffer(zlib.decompress(base64.b85decode(body)), np.uint8)
    return np.unpackbits(bits, count=int(np.prod(shape))).reshape(shape).astype(bool)
