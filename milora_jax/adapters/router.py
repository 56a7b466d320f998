"""The prompt-aware router: pool the prompt, activate, score, choose k (paper, section 3.2 and 3.3).

The setting ``features`` decides what the router reads. The residual stream of real models holds values in the
thousands in a few dimensions, above all in the first token (massive activations: Sun et al. 2024, arXiv
2402.17762). The paper does not discuss them.

- ``raw``: the pooled residual stream, exactly as in the paper. On a published model a few dimensions dominate
  it, the rational activation leaves the range of its fit, and every prompt gets nearly the same route.
- ``rms``: the pooled vector scaled to unit root mean square. No value exceeds sqrt(D), but the same few
  dimensions dominate.
- ``standardized``: every token is read after the layer's input norm and scaled to unit root mean square, so
  that no token outweighs the others; the pooled vector is then standardized, dimension by dimension, with the
  mean and the deviation over training prompts on the frozen base (``training.calibration``), and limited to
  [-3, 3], where the activation's fit holds. What all prompts have in common, a template or a first token, is
  removed; what differs between prompts is of order 1 in every dimension. The attention pooler's scores are
  divided by sqrt(D): a token's score is then at most the norm of W_sa. Training changes what the routers
  read, so the statistics follow it as running averages (``feature_window``).

Everything runs in float32 whatever the base's dtype: the output is only 7 columns wide, and a route must not
depend on the rounding of a bfloat16 softmax.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct

from milora_jax.adapters.inputs import LayerInput
from milora_jax.adapters.rational import gelu_coefficients, rational
from milora_jax.shapes import Array, Bool, Float, Int, Key
from milora_jax.types import EXPERTS, Route, RouterInputs

NORMALIZE_EPS = 1e-6
"""Keeps the norm of an all-zero vector finite."""

FEATURE_LIMIT = 3.0
"""Standardized features are clipped to plus and minus this: the range of the activation's fit to GELU."""


@struct.dataclass
class RouterParams:
    """One router per layer, stacked over layers outside a layer.

    Attributes:
      pool: W_sa of the self-attention pooler (Eq. 8); None with the other poolers.
      weight: W_r (Eq. 2), without a bias.
      numerator, denominator: coefficients of the rational activation; None with fixed activations.
      mean, deviation: of the pooled vectors over training prompts; None unless features are standardized.
      bias: added to the probabilities for the choice only; None unless it balances the load.
    """

    pool: Float[Array, "*L D"] | None
    weight: Float[Array, "*L D E"]
    numerator: Float[Array, "*L 7"] | None
    denominator: Float[Array, "*L 5"] | None
    mean: Float[Array, "*L D"] | None = None
    deviation: Float[Array, "*L D"] | None = None
    bias: Float[Array, "*L E"] | None = None


@dataclass(frozen=True)
class Router:
    """Settings of the router; see ``adapters.milora.MiLoRA`` for the meaning of each.

    Attributes:
      dense: whether experts that are not chosen contribute to the router's gradient.
      biased: whether a bias is added for the choice.
    """

    top_k: int
    pooler: str
    activation: str
    features: str
    gate: str
    dense: bool = False
    biased: bool = False

    def init(self, key: Key[Array, ""], num_layers: int, hidden_size: int) -> RouterParams:
        """Make fresh parameters: W_r normal with standard deviation 0.02; W_sa zero, which pools by the
        average; coefficients fitted to GELU. Statistics that have not been measured yet leave the features as
        they are.
        """
        numerator, denominator = (
            gelu_coefficients(num_layers) if self.activation == "rational" else (None, None)
        )
        return RouterParams(
            pool=jnp.zeros((num_layers, hidden_size), jnp.float32) if self.pooler == "attention" else None,
            weight=0.02 * jax.random.normal(key, (num_layers, hidden_size, len(EXPERTS)), jnp.float32),
            numerator=numerator,
            denominator=denominator,
            mean=jnp.zeros((num_layers, hidden_size), jnp.float32) if self.standardizes else None,
            deviation=jnp.ones((num_layers, hidden_size), jnp.float32) if self.standardizes else None,
            bias=jnp.zeros((num_layers, len(EXPERTS)), jnp.float32) if self.biased else None,
        )

    @property
    def standardizes(self) -> bool:
        """Whether the features are standardized by the mean and the deviation of training prompts."""
        return self.features == "standardized"

    def __call__(
        self,
        params: RouterParams,
        entering: LayerInput,
        top_k: Int[Array, ""] | None = None,
    ) -> Route:
        """Route every prompt of every row (Eq. 2 and 3).

        Args:
          params: this layer's router.
          entering: the layer's input; only the prompts' tokens are read.
          top_k: number of experts, where a schedule sets another than the settings.
        """
        pooled, token_share = self.pooled(entering, params.pool)
        features = limited = pooled
        if self.features == "rms":
            features = limited = scaled(pooled)
        elif params.mean is not None and params.deviation is not None:
            # Measured deviations are never below this; those of a bank's slot for the base alone are 0.
            deviation = jnp.maximum(params.deviation, LEAST)
            features = (pooled - params.mean[None, None]) / deviation[None, None]
            limited = jnp.clip(features, -FEATURE_LIMIT, FEATURE_LIMIT)
        activated = activate(limited, self.activation, params, entering.depth)
        logits = jnp.einsum("BZD,DE->BZE", activated, params.weight, precision=jax.lax.Precision.HIGHEST)
        probs = jax.nn.softmax(logits, axis=-1)
        weights = expert_weights(
            probs, self.top_k if top_k is None else top_k, self.gate, dense=self.dense, bias=params.bias
        )
        present = entering.members.any(axis=-1)
        seen = RouterInputs(
            largest=jnp.where(present, jnp.abs(limited).max(axis=-1), 0.0),
            spread=jnp.where(present, jnp.sqrt(jnp.mean(features**2, axis=-1)), 0.0),
            token_share=None if token_share is None else jnp.where(present, token_share, 0.0),
            sums=_sums(features, present) if self.standardizes else None,
        )
        return Route(weights=weights, probs=probs, present=present, seen=jax.lax.stop_gradient(seen))

    def pooled(
        self, entering: LayerInput, weight: Float[Array, " D"] | None
    ) -> tuple[Float[Array, "B Z D"], Float[Array, "B Z"] | None]:
        """One vector per prompt, and the largest share of a token in the attention pooler.

        Args:
          weight: W_sa of the layer; None with the other poolers.
        """
        if not self.standardizes:
            return pool(entering.hidden.astype(jnp.float32), entering.members, self.pooler, weight)
        if weight is not None:
            weight = weight * weight.shape[-1] ** -0.5
        return pool(scaled(entering.normed.astype(jnp.float32)), entering.members, self.pooler, weight)


FLOOR = 0.05
"""Least deviation of a dimension, as a share of the root mean square of its layer's deviations: a dimension
that hardly differs between prompts must not weigh as much as the others."""

LEAST = 1e-4
"""Least deviation of any dimension. Pooled vectors have unit root mean square: less than this is rounding."""


def floored(deviation: Float[Array, "L D"]) -> Float[Array, "L D"]:
    """Raise deviations to :data:`FLOOR` of their layer's, and to :data:`LEAST`."""
    of_layer = jnp.sqrt(jnp.mean(deviation**2, axis=-1, keepdims=True))
    return jnp.maximum(deviation, jnp.maximum(FLOOR * of_layer, LEAST))


def followed(params: RouterParams, moments: Float[Array, "L 2 D"], window: float) -> RouterParams:
    """Move the statistics one step towards those of a batch of prompts, as running averages.

    Training updates the adapter, and with it what the routers read: the statistics of the frozen base would
    go out of date.

    Args:
      moments: mean over the prompts of the features standardized by ``params``, and of their squares.
      window: steps over which the averages are taken.
    """
    if params.mean is None or params.deviation is None:
        raise ValueError("features that are not standardized have no statistics")
    first, second = moments[:, 0], moments[:, 1]
    share = 1.0 / window
    moved = share * first
    variance = 1.0 - share + share * (second - 2.0 * moved * first + moved**2)
    deviation = floored(params.deviation * jnp.sqrt(jnp.maximum(variance, 0.0)))
    mean = params.mean + params.deviation * moved
    return dataclasses.replace(params, mean=mean, deviation=deviation)


def _sums(features: Float[Array, "B Z D"], present: Bool[Array, "B Z"]) -> Float[Array, "2 D"]:
    """The field ``sums`` of :class:`milora_jax.types.RouterInputs`."""
    here = jnp.where(present[..., None], features, 0.0)
    return jnp.stack([here.sum(axis=(0, 1)), (here**2).sum(axis=(0, 1))])


def scaled(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Scale vectors to unit root mean square."""
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + NORMALIZE_EPS)


def pool(
    hidden: Float[Array, "B T D"],
    members: Bool[Array, "B Z T"],
    pooler: str,
    weight: Float[Array, " D"] | None,
) -> tuple[Float[Array, "B Z D"], Float[Array, "B Z"] | None]:
    """Pool the vectors of each prompt's tokens into one (section 3.3, Eq. 8), and return the largest share of
    a token as well where the pooler has shares.

    A prompt without tokens (a filler row) gives a finite vector that nobody reads.
    """
    if pooler == "attention":
        scores = jnp.einsum("BTD,D->BT", hidden, weight, precision=jax.lax.Precision.HIGHEST)
        scores = jnp.where(members, scores[:, None, :], jnp.finfo(jnp.float32).min)
        shares = jax.nn.softmax(scores, axis=-1)
        pooled = jnp.einsum("BZT,BTD->BZD", shares, hidden, precision=jax.lax.Precision.HIGHEST)
        return pooled, shares.max(axis=-1)
    if pooler == "mean":
        count = jnp.maximum(members.sum(axis=-1, keepdims=True), 1).astype(jnp.float32)
        total = jnp.einsum(
            "BZT,BTD->BZD", members.astype(jnp.float32), hidden, precision=jax.lax.Precision.HIGHEST
        )
        return total / count, None
    if pooler == "max":
        # One record at a time: a [B, Z, T, D] intermediate would be Z times the residual stream.
        lowest = jnp.finfo(jnp.float32).min
        best = [
            jnp.max(jnp.where(members[:, z, :, None], hidden, lowest), axis=1)
            for z in range(members.shape[1])
        ]
        return jnp.where(members.any(axis=-1)[..., None], jnp.stack(best, axis=1), 0.0), None
    if pooler == "last":
        order = jnp.arange(members.shape[-1])[None, None, :]
        last = jnp.argmax(jnp.where(members, order, -1), axis=-1)
        return jnp.take_along_axis(hidden, last[..., None], axis=1), None
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


def chosen_experts(scores: Float[Array, "*B E"], top_k: int | Int[Array, ""]) -> Float[Array, "*B E"]:
    """1 for the ``top_k`` experts with the highest scores, 0 for the others; ties go to the first expert.

    ``top_k`` may be traced, so that a schedule needs no new compilation.
    """
    order = jnp.argsort(scores, axis=-1, stable=True, descending=True)
    return (jnp.argsort(order, axis=-1) < top_k).astype(jnp.float32)


def expert_weights(
    probs: Float[Array, "*B E"],
    top_k: int | Int[Array, ""],
    gate: str,
    *,
    dense: bool = False,
    bias: Float[Array, " E"] | None = None,
) -> Float[Array, "*B E"]:
    """The factor of each expert's output: non-zero for exactly the ``top_k`` most probable.

    ``softmax`` keeps the probabilities (exactly Eq. 3); ``renormalized`` scales the chosen ones to sum to k;
    ``straight_through`` is exactly 1 forward with the gradient of the probability, so that k = 7 is plain
    LoRA.

    Args:
      dense: give the router the gradient of the experts that are not chosen as well (DenseMixer, Yao et al.
        2025): their weight is 0 forward, with the gradient of the probability.
      bias: added to the probabilities for the choice only (Wang et al. 2024, arXiv
        2408.15664).
    """
    still = jax.lax.stop_gradient(probs)
    mask = chosen_experts(still if bias is None else still + jnp.broadcast_to(bias, still.shape), top_k)
    change = probs - still
    if gate == "softmax":
        weights = mask * probs
    elif gate == "renormalized":
        kept = mask * probs
        weights = top_k * kept / kept.sum(axis=-1, keepdims=True)
    elif gate == "straight_through":
        weights = mask * (1.0 + change)
    else:
        raise ValueError(f"unknown gate {gate!r}")
    return weights + (1.0 - mask) * change if dense else weights


def first_choices(route: Route, prompts: Int[Array, ""] | None = None) -> Float[Array, "*L E"]:
    """``f_i`` of Eq. 5: the share of the prompts whose most probable expert is i, per layer; no gradient.

    Args:
      prompts: see :func:`load_balance`.
    """
    first = jax.nn.one_hot(jnp.argmax(route.probs, axis=-1), route.probs.shape[-1], dtype=jnp.float32)
    return jax.lax.stop_gradient(_mean_of_present(first, route.present, prompts))


def load_balance(
    route: Route, first: Float[Array, "*L E"] | None = None, prompts: Int[Array, ""] | None = None
) -> Float[Array, ""]:
    """``N sum_i f_i P_i`` (Eq. 4 and 5), averaged over layers; 1 when perfectly balanced.

    Args:
      route: routes of all prompts of the global batch, or of a part of it.
      first: :func:`first_choices` of the global batch; needed where ``route`` covers a part of it, and the
        terms of all parts then sum to that of the whole.
      prompts: number of prompts in the global batch; needed likewise.
    """
    first = first_choices(route) if first is None else first
    mean = _mean_of_present(route.probs, route.present, prompts)
    return jnp.mean(route.probs.shape[-1] * (first * mean).sum(axis=-1))


def expert_share(route: Route, prompts: Int[Array, ""] | None = None) -> Float[Array, "*L E"]:
    """Share of the prompts that chose each expert, per layer (Figure 2 of the paper).

    Args:
      prompts: see :func:`load_balance`.
    """
    return _mean_of_present((route.weights != 0).astype(jnp.float32), route.present, prompts)


def _mean_of_present(
    values: Float[Array, "*L B Z E"], present: Bool[Array, "*L B Z"], prompts: Int[Array, ""] | None
) -> Float[Array, "*L E"]:
    """Sum over the prompts that are present, divided by ``prompts``; None divides by their number here."""
    here = jnp.broadcast_to(present.astype(jnp.float32)[..., None], values.shape)
    count = jnp.asarray(present.sum(axis=(-2, -1)) if prompts is None else prompts)
    count = jnp.maximum(count, 1).astype(jnp.float32)
    return (values * here).sum(axis=(-3, -2)) / (count[..., None] if count.ndim else count)
