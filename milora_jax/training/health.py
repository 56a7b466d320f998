"""Statistics of the dev prompts' routes at an evaluation, and warnings about unhealthy routers."""

from __future__ import annotations

import base64
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from milora_jax.adapters.protocol import Method
from milora_jax.config import AdapterSection
from milora_jax.parallel.processes import to_host
from milora_jax.shapes import Bool, Float
from milora_jax.types import EXPERTS, Metrics, Route

TAKEOVER = 0.75
"""An expert has taken over when it is the most probable one for this share of all (layer, dev prompt) pairs.
Balanced routers give each expert 1/7 of them; well trained ones without a load balance give up to half to the
expert that helps most."""

COLLAPSE = 0.9
"""A layer's router has collapsed when the mean probability of one expert reaches this."""


BLIND = 0.95
"""A layer's router is blind when this share of the prompts has one and the same route there."""

BLIND_LAYERS = 1 / 3
"""The share of layers with a blind router from which on there is a warning."""

SATURATED = 0.9
"""A pooler is saturated when the share of one token reaches this: it reads that token only."""


@dataclass(frozen=True)
class PromptRoutes:
    """The routes of N prompts.

    Attributes:
      probs: router softmax.
      chosen: the chosen experts, k of them in every layer.
      largest, spread, token_share: see ``types.RouterInputs``.
    """

    probs: Float[np.ndarray, "L N E"]
    chosen: Bool[np.ndarray, "L N E"]
    largest: Float[np.ndarray, "L N"]
    spread: Float[np.ndarray, "L N"]
    token_share: Float[np.ndarray, "L N"] | None

    @classmethod
    def of(cls, route: Route) -> PromptRoutes:
        """Collect the routes of the prompts that are present, row by row."""
        host = to_host(route)
        share, present = host.seen.token_share, host.present[0]  # the same in every layer
        return cls(
            probs=host.probs[:, present],
            chosen=host.weights[:, present] != 0,
            largest=host.seen.largest[:, present],
            spread=host.seen.spread[:, present],
            token_share=None if share is None else share[:, present],
        )

    @classmethod
    def joined(cls, parts: Sequence[PromptRoutes]) -> PromptRoutes:
        """Concatenate the prompts of all parts in order."""

        def one(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            return None if values[0] is None else np.concatenate(values, axis=1)

        return cls(**{name: one(name) for name in ("probs", "chosen", "largest", "spread", "token_share")})


@dataclass(frozen=True)
class RoutingHealth:
    """The routes of all dev prompts at one evaluation.

    Attributes:
      share: share of the prompts that chose each expert.
      entropy: entropy of the router's softmax in nats, mean over prompts; at most log 7 = 1.95.
      margin: probability by which the k-th most probable expert exceeds the next, mean over prompts; null
        where k is 7.
      probability: probability of each expert, mean over prompts.
      first: share of the prompts for which each expert is the most probable.
      changed: share of (layer, prompt) pairs whose chosen set differs from that of the last evaluation; None
        at the first.
      common: share of the prompts that have the layer's commonest route.
      agree: the same within the prompts of one data source, mean over all prompts.
      across: share of the pairs of prompts of two sources that have the same route in the layer; None with
        one source.
      largest: largest absolute value that entered the activation.
      spread: root mean square of the features over prompts and dimensions; see ``types.RouterInputs``.
      token_share: largest share of one token in the attention pooler, mean over prompts; None without one.
    """

    share: Float[np.ndarray, "L E"]
    entropy: Float[np.ndarray, " L"]
    margin: Float[np.ndarray, " L"] | None
    probability: Float[np.ndarray, "L E"]
    first: Float[np.ndarray, "L E"]
    changed: float | None
    common: Float[np.ndarray, " L"]
    agree: Float[np.ndarray, " L"]
    across: Float[np.ndarray, " L"] | None
    largest: Float[np.ndarray, " L"]
    spread: Float[np.ndarray, " L"]
    token_share: Float[np.ndarray, " L"] | None

    def to_json(self) -> dict[str, Any]:
        """Fields for ``metrics.jsonl``."""
        by_layer = {
            "expert_share": self.share,
            "route_entropy": self.entropy,
            "route_margin": self.margin,
            "expert_first": self.first,
            "route_common": self.common,
            "route_agree": self.agree,
            "route_across": self.across,
            "router_input_max": self.largest,
            "feature_spread": self.spread,
            "pooler_share": self.token_share,
        }
        lists = {
            name: None if values is None else np.round(values.astype(float), 4).tolist()
            for name, values in by_layer.items()
        }
        return {**lists, "route_changed": self.changed}

    def warning(self, settings: AdapterSection) -> str | None:
        """One line with a remedy if routers are blind or saturated, or an expert has taken over; else None.

        Args:
          settings: settings of the method, which decide the remedy.
        """
        what = blindness(self.common) or saturation(self.token_share) or self._takeover()
        return None if what is None else f"routing: {what}; {remedy(settings)}"

    def _takeover(self) -> str | None:
        by_expert = self.first.mean(axis=0)
        leader = int(by_expert.argmax())
        if by_expert[leader] >= TAKEOVER:
            return (
                f"expert {EXPERTS[leader]} is the first choice in {by_expert[leader]:.0%} of all layers and "
                "dev prompts (balanced: 14%)"
            )
        layers = np.flatnonzero(self.probability.max(axis=1) >= COLLAPSE)
        if not layers.size:
            return None
        said = ", ".join(f"{EXPERTS[self.probability[i].argmax()]} in layer {i}" for i in layers)
        return f"one expert holds {COLLAPSE:.0%} or more of the probability: {said}"


def routing_health(
    routes: PromptRoutes, before: Bool[np.ndarray, "L M E"] | None, sources: Sequence[str]
) -> RoutingHealth:
    """Measure the routes of N prompts.

    Args:
      before: ``chosen`` at the last evaluation; None if there was none. That of other dev rows is ignored.
      sources: name of the data set of each prompt.
    """
    probs, chosen = routes.probs, routes.chosen
    entropy, margin = decisions(probs, int(chosen[0, 0].sum()))
    first = np.eye(probs.shape[-1])[probs.argmax(axis=-1)]
    comparable = before is not None and before.shape == chosen.shape
    return RoutingHealth(
        share=chosen.mean(axis=1),
        entropy=entropy,
        margin=margin,
        probability=probs.mean(axis=1),
        first=first.mean(axis=1),
        changed=float((before != chosen).any(axis=-1).mean()) if comparable else None,
        **agreement(chosen, sources),
        largest=routes.largest.max(axis=1),
        spread=np.sqrt((routes.spread.astype(float) ** 2).mean(axis=1)),
        token_share=None if routes.token_share is None else routes.token_share.mean(axis=1),
    )


def blindness(common: Float[np.ndarray, " L"]) -> str | None:
    """A line if too many routers are blind by :attr:`RoutingHealth.common`, else None."""
    blind = common >= BLIND
    if blind.mean() < BLIND_LAYERS:
        return None
    shared = common[blind].mean()
    return f"{shared:.0%} of the dev prompts share one route in {blind.sum()} of {len(common)} layers"


def saturation(token_share: Float[np.ndarray, " L"] | None) -> str | None:
    """A line if poolers are saturated by :attr:`RoutingHealth.token_share`, else None."""
    if token_share is None or (full := token_share >= SATURATED).mean() < BLIND_LAYERS:
        return None
    return (
        f"one token has {SATURATED:.0%} or more of the pooler in {full.sum()} of {len(full)} layers: "
        "the routers read no other"
    )


def remedy(settings: AdapterSection) -> str:
    """What to change, with the method's present settings, about routers that do not follow the prompt."""
    if settings.features != "standardized":
        return "adapter.features=standardized reads what differs between prompts"
    if settings.feature_window == 0:
        return "adapter.feature_window=0.1 lets the statistics of the features follow training"
    if settings.top_k_anneal == 0:
        return "adapter.top_k_anneal=0.4 trains every expert before it has to be chosen"
    return "a smaller train.router_rate keeps the routers closer to their beginning"


def decisions(
    probs: Float[np.ndarray, "L N E"], top_k: int
) -> tuple[Float[np.ndarray, " L"], Float[np.ndarray, " L"] | None]:
    """``entropy`` and ``margin`` of :class:`RoutingHealth`."""
    falling = -np.sort(-probs, axis=-1)
    plogp = np.where(probs > 0, probs * np.log(np.maximum(probs, 1e-30)), 0.0)
    behind = None
    if top_k < probs.shape[-1]:
        behind = (falling[..., top_k - 1] - falling[..., top_k]).mean(axis=1)
    return -plogp.sum(axis=-1).mean(axis=1), behind


def agreement(chosen: Bool[np.ndarray, "L N E"], sources: Sequence[str]) -> dict[str, Any]:
    """``common``, ``agree`` and ``across`` of :class:`RoutingHealth`."""
    sets = chosen @ (1 << np.arange(chosen.shape[-1]))  # [L, N]
    names = sorted(set(sources))
    counts = [
        [Counter(layer[np.array([source == name for source in sources])].tolist()) for name in names]
        for layer in sets
    ]
    total = len(sources)
    common = [max(sum(layer, Counter()).values()) / total for layer in counts]
    agree = [sum(max(each.values()) for each in layer) / total for layer in counts]
    pairs = (total**2 - sum(sources.count(name) ** 2 for name in names)) / 2
    across = [
        sum(one[route] * other[route] for i, one in enumerate(layer) for other in layer[:i] for route in one)
        / max(pairs, 1)
        for layer in counts
    ]
    return {
        "common": np.array(common),
        "agree": np.array(agree),
        "across": np.array(across) if len(names) > 1 else None,
    }


def pack_routes(chosen: Bool[np.ndarray, "L N E"]) -> str:
    """Pack chosen sets into a short string for a checkpoint; :func:`unpack_routes` is the inverse."""
    shape = ",".join(map(str, chosen.shape))
    return f"{shape}:{base64.b85encode(zlib.compress(np.packbits(chosen).tobytes())).decode()}"


def unpack_routes(packed: str) -> Bool[np.ndarray, "L N E"]:
    """Inverse of :func:`pack_routes`."""
    head, body = packed.split(":", 1)
    shape = tuple(int(size) for size in head.split(","))
    bits = np.frombuffer(zlib.decompress(base64.b85decode(body)), np.uint8)
    return np.unpackbits(bits, count=int(np.prod(shape))).reshape(shape).astype(bool)


def step_figures(method: Method, step: int, total_steps: int, metrics: Metrics) -> dict[str, float]:
    """The figures of a step's routers and of their schedules; empty without a router.

    Args:
      step: number of the step, from 0.
    """
    if not method.routes:
        return {}
    top_k, load_balance = method.schedule(jnp.asarray(step), total_steps)
    figures = {
        "router_grad_norm": float(metrics.router_grad_norm),
        "pooled_max": float(metrics.pooled_max),
        "balance_weight": float(load_balance),
    }
    return figures if top_k is None else {**figures, "top_k": int(top_k)}
