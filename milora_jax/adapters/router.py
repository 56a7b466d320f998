"""The prompt-aware router: pool the prompt, activate, score, choose k (paper, section 3.2 and 3.3).

What enters the activation. The residual stream of real LLaMA models holds values in the thousands in
a few dimensions (Sun et al. 2024, arXiv 2402.17762), where a rational function of order 6/5 grows
like x^2 and is nothing like the GELU it was fitted to. The paper is silent about it. We normalise the
pooled vector to unit root mean square before the activation by default (``normalize``): its ordinary
values then lie where the fit holds, and no value exceeds sqrt(D). A few outlying dimensions still may
lie beyond 3, where the activation is not GELU but bounded. The option off is the paper's text to the
letter. ``Route.pooled_max`` reports the largest value that went in.

All of it runs in float32 whatever the base's dtype: it is 7 columns wide, and a route must not depend
on the rounding of a bfloat16 softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct

from milora_jax.adapters.rational import gelu_coefficients, rational
from milora_jax.shapes import Array, Bool, Float, Int, Key
from milora_jax.types import EXPERTS, Route

NORMALIZE_EPS = 1e-6
"""Keeps the normalisation of an all-zero pooled vector finite."""


@struct.dataclass
class RouterParams:
    """One router per layer, stacked over layers outside a layer.

    Attributes:
      pool: W_sa of the self-attention pooler (Eq. 8); None with the other poolers.
      weight: W_r (Eq. 2), without a bias.
      numerator, denominator: coefficients of the rational activation; None with fixed activations.
    """

    pool: Float[Array, "*L D"] | None
    weight: Float[Array, "*L D E"]
    numerator: Float[Array, "*L 7"] | None
    denominator: Float[Array, "*L 5"] | None


@dataclass(frozen=True)
class Router:
    """Settings of the router; see ``config.AdapterSection`` for the meaning of each."""

    top_k: int
    pooler: str
    activation: str
    normalize: bool
    gate: str

    def init(self, key: Key[Array, ""], num_layers: int, hidden_size: int) -> RouterParams:
        """Fresh parameters: W_r normal with standard deviation 0.02; W_sa zero, which is the average
        pooler; coefficients fitted to GELU."""
        numerator, denominator = (
            gelu_coefficients(num_layers) if self.activation == "rational" else (None, None)
        )
        return RouterParams(
            pool=jnp.zeros((num_layers, hidden_size), jnp.float32) if self.pooler == "attention" else None,
            weight=0.02 * jax.random.normal(key, (num_layers, hidden_size, len(EXPERTS)), jnp.float32),
            numerator=numerator,
            denominator=denominator,
        )

    def __call__(
        self,
        params: RouterParams,
        hidden: Float[Array, "B T D"],
        members: Bool[Array, "B Z T"],
        depth: Float[Array, ""],
    ) -> Route:
        """Route every prompt of every row (Eq. 2 and 3).

        Args:
          params: this layer's router.
          hidden: residual stream before the layer.
          members: which tokens are the prompt of which record; no other token is looked at.
          depth: layer index over L.
        """
        pooled = pool(hidden.astype(jnp.float32), members, self.pooler, params.pool)
        if self.normalize:
            pooled = pooled * jax.lax.rsqrt(jnp.mean(pooled**2, axis=-1, keepdims=True) + NORMALIZE_EPS)
        activated = activate(pooled, self.activation, params, depth)
        logits = jnp.einsum("BZD,DE->BZE", activated, params.weight, precision=jax.lax.Precision.HIGHEST)
        probs = jax.nn.softmax(logits, axis=-1)
        present = members.any(axis=-1)[..., None]
        return Route(
            weights=expert_weights(probs, self.top_k, self.gate),
            probs=probs,
            pooled_max=jax.lax.stop_gradient(jnp.max(jnp.abs(jnp.where(present, pooled, 0.0)))),
        )


def pool(
    hidden: Float[Array, "B T D"],
    members: Bool[Array, "B Z T"],
    pooler: str,
    weight: Float[Array, " D"] | None,
) -> Float[Array, "B Z D"]:
    """One vector per prompt from its tokens' hidden states (section 3.3, Eq. 8).

    A prompt without tokens (a filler row) gives a finite vector that nobody reads.
    """
    if pooler == "attention":
        scores = jnp.einsum("BTD,D->BT", hidden, weight, precision=jax.lax.Precision.HIGHEST)
        scores = jnp.where(members, scores[:, None, :], jnp.finfo(jnp.float32).min)
        shares = jax.nn.softmax(scores, axis=-1)
        return jnp.einsum("BZT,BTD->BZD", shares, hidden, precision=jax.lax.Precision.HIGHEST)
    if pooler == "mean":
        count = jnp.maximum(members.sum(axis=-1, keepdims=True), 1).astype(jnp.float32)
        total = jnp.einsum(
            "BZT,BTD->BZD", members.astype(jnp.float32), hidden, precision=jax.lax.Precision.HIGHEST
        )
        return total / count
    if pooler == "max":
        # One record at a time: a [B, Z, T, D] intermediate would be Z times the residual stream.
        lowest = jnp.finfo(jnp.float32).min
        best = [
            jnp.max(jnp.where(members[:, z, :, None], hidden, lowest), axis=1)
            for z in range(members.shape[1])
        ]
        return jnp.where(members.any(axis=-1)[..., None], jnp.stack(best, axis=1), 0.0)
    if pooler == "last":
        order = jnp.arange(members.shape[-1])[None, None, :]
        last = jnp.argmax(jnp.where(members, order, -1), axis=-1)
        return jnp.take_along_axis(hidden, last[..., None], axis=1)
    raise ValueError(f"unknown pooler {pooler!r}")


def activate(
    pooled: Float[Array, "B Z D"], activation: str, params: RouterParams, depth: Float[Array, ""]
) -> Float[Array, "B Z D"]:
    """The activation g before the router matrix (Eq. 2 and 6, and the ablations of Table 5)."""
    if activation == "rational":
        if params.numerator is None or params.denominator is None:
            raise ValueError("a rational activation needs its coefficients")
        return rational(pooled, params.numerator, params.denominator)
    gelu, relu = jax.nn.gelu(pooled, approximate=False), jax.nn.relu(pooled)
    if activation == "gelu":
        return gelu
    if activation == "relu":
        return relu
    if activation == "relu-gelu":
        return jnp.where(depth < 0.5, relu, gelu)
    if activation == "gelu-relu":
        return jnp.where(depth < 0.5, gelu, relu)
    raise ValueError(f"unknown activation {activation!r}")


def expert_weights(probs: Float[Array, "*B E"], top_k: int, gate: str) -> Float[Array, "*B E"]:
    """What each expert's output is multiplied by: non-zero for exactly the ``top_k`` most probable.

    ``softmax`` keeps the probabilities (Eq. 3 to the letter); ``renormalized`` makes the chosen ones
    sum to k; ``straight_through`` is exactly 1 forward with the gradient of the probability, so that
    k = 7 is plain LoRA.
    """
    _, chosen = jax.lax.top_k(probs, top_k)
    mask = jax.nn.one_hot(chosen, probs.shape[-1], dtype=jnp.float32).sum(axis=-2)
    if gate == "softmax":
        return mask * probs
    if gate == "renormalized":
        kept = mask * probs
        return top_k * kept / kept.sum(axis=-1, keepdims=True)
    if gate == "straight_through":
        return mask * (1.0 + (probs - jax.lax.stop_gradient(probs)))
    raise ValueError(f"unknown gate {gate!r}")


def first_choices(probs: Float[Array, "*L B Z E"], present: Bool[Array, "B Z"]) -> Float[Array, "*L E"]:
    """``f_i`` of Eq. 5: the share of the prompts whose most probable expert is i, per layer; no gradient.

    Args:
      present: false for rows and segments that hold no prompt.
    """
    first = jax.nn.one_hot(jnp.argmax(probs, axis=-1), probs.shape[-1], dtype=jnp.float32)
    return jax.lax.stop_gradient(_mean_of_present(first, present, present.sum()))


def load_balance(
    probs: Float[Array, "*L B Z E"],
    present: Bool[Array, "B Z"],
    first: Float[Array, "*L E"] | None = None,
    prompts: Int[Array, ""] | None = None,
) -> Float[Array, ""]:
    """``N sum_i f_i P_i`` (Eq. 4 and 5), averaged over layers; 1 when perfectly balanced.

    Args:
      probs: router softmax of every prompt of the global batch, or of a part of it.
      present: false for rows and segments that hold no prompt.
      first: :func:`first_choices` of the global batch; needed where ``probs`` is a part of it, and the
        terms of all parts then sum to that of the whole.
      prompts: how many are present in the global batch; needed likewise.
    """
    first = first_choices(probs, present) if first is None else first
    mean = _mean_of_present(probs, present, present.sum() if prompts is None else prompts)
    return jnp.mean(probs.shape[-1] * (first * mean).sum(axis=-1))


def expert_share(
    weights: Float[Array, "*L B Z E"], present: Bool[Array, "B Z"], prompts: Int[Array, ""] | None = None
) -> Float[Array, "*L E"]:
    """Share of the prompts that chose each expert, per layer (Figure 2 of the paper).

    Args:
      prompts: see :func:`load_balance`.
    """
    chosen = (weights != 0).astype(jnp.float32)
    return _mean_of_present(chosen, present, present.sum() if prompts is None else prompts)


def _mean_of_present(
    values: Float[Array, "*L B Z E"], present: Bool[Array, "B Z"], prompts: Int[Array, ""]
) -> Float[Array, "*L E"]:
    """Sum over the prompts that are present, over the number of prompts."""
    here = jnp.broadcast_to(present.astype(jnp.float32)[..., None], values.shape)
    return (values * here).sum(axis=(-3, -2)) / jnp.maximum(prompts, 1).astype(jnp.float32)
