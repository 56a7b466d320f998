"""The training loss: response cross entropy plus the load-balance term (section 3.4)."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from flax import struct

from milora_jax.adapters.inputs import ExpertUse, RoutingSchedule
from milora_jax.adapters.protocol import Adapter
from milora_jax.adapters.router import expert_share, first_choices, load_balance
from milora_jax.base.attention import Attend, attention
from milora_jax.base.modules import Base
from milora_jax.base.transformer import forward
from milora_jax.model_config import ModelConfig
from milora_jax.shapes import Array, Float, Int, Key, Shaped
from milora_jax.training.cross_entropy import summed_cross_entropy
from milora_jax.training.noise import embedding_noise
from milora_jax.types import EXPERTS, Batch, PreferenceSums, PyTree, Route


@struct.dataclass
class LossParts:
    """The terms of the loss, and figures beside it; see ``types.Metrics``. All but ``pooled_max`` and
    ``route`` sum over the parts of a batch to those of the whole.

    Attributes:
      use: use of the experts by the batch's prompts; 1 for all experts without a router.
      route: routes of the batch's prompts; None without a router.
      preference: figures of a preference objective; None for supervised tuning.
    """

    cross_entropy: Float[Array, ""]
    load_balance: Float[Array, ""]
    use: ExpertUse
    pooled_max: Float[Array, ""]
    tokens: Int[Array, ""]
    route: Route | None
    preference: PreferenceSums | None = None


@struct.dataclass
class Totals:
    """Sums over a whole batch by which the losses of its parts are divided and weighted.

    Attributes:
      tokens: number of counted tokens; with a preference objective those that are imitated.
      prompts: number of prompts.
      first_choices: share of the prompts for which each expert is the most probable (Eq. 5); None without a
        router.
      kl: sum of the log-ratios from which kto estimates the divergence; None with other objectives.
      parts: number of parts of the batch.
    """

    tokens: Int[Array, ""]
    prompts: Int[Array, ""]
    first_choices: Float[Array, "L E"] | None
    kl: Float[Array, ""] | None = None
    parts: int = struct.field(pytree_node=False, default=1)


def adapted_loss(
    adapter: Adapter,
    base: Base,
    config: ModelConfig,
    batch: Batch,
    *,
    key: Key[Array, ""] | None,
    remat: str = "none",
    loss_chunk: int = 4096,
    attend: Attend = attention,
    totals: Totals | None = None,
    schedule: RoutingSchedule | None = None,
    memory: PyTree = None,
    neftune_alpha: float = 0.0,
) -> tuple[Float[Array, ""], LossParts]:
    """Mean cross entropy over the counted tokens of the global batch, plus the method's terms: lambda times
    Eq. 4 where it routes, and its penalty on the parameters.

    Args:
      key: random key of dropout and noise; None switches both off.
      remat: what the backward pass computes again, one of ``config.REMAT``.
      loss_chunk: tokens whose logits are in memory at a time.
      attend: the attention function.
      totals: totals of the whole batch, where ``batch`` is a part of it: the losses of all parts, the terms
        and the shares sum to those of the whole.
      schedule: the routing settings of a training step; None takes the final ones.
      memory: the method's state from earlier steps; None for none.
      neftune_alpha: size of the noise on the embeddings, see ``training.noise``. A method that routes then
        routes in a pass of its own, without noise, through which the gradient passes too.
    """
    schedule = adapter.method.final_schedule if schedule is None else schedule
    run = functools.partial(
        forward,
        base,
        config,
        batch,
        adapter=adapter,
        key=key if adapter.method.stochastic else None,
        remat=remat,
        attend=attend,
    )
    if key is None or neftune_alpha == 0:
        output = run(top_k=schedule.top_k)
    else:
        noise = embedding_noise(batch, config.hidden_size, neftune_alpha, key)
        route = run(top_k=schedule.top_k).route if adapter.method.routes else None
        output = run(noise=noise, route=None if route is None else route.weights)
        output = dataclasses.replace(output, route=route)
    # The hidden state of token t predicts token t + 1; the last one of a row predicts no token.
    targets, counted = (following(field) for field in (batch.tokens, batch.loss_mask))
    summed = summed_cross_entropy(base, config, output.hidden, targets, counted, loss_chunk)
    whole = totals_of(batch, output.route) if totals is None else totals
    cross_entropy = summed / jnp.maximum(whole.tokens, 1).astype(jnp.float32)
    loss, parts = with_terms(adapter, config, output.route, cross_entropy, whole, schedule, memory)
    return loss, dataclasses.replace(parts, cross_entropy=cross_entropy, tokens=counted.sum())


def with_terms(
    adapter: Adapter,
    config: ModelConfig,
    route: Route | None,
    objective: Float[Array, ""],
    whole: Totals,
    schedule: RoutingSchedule,
    memory: PyTree,
) -> tuple[Float[Array, ""], LossParts]:
    """Add the method's terms to the value of an objective.

    Args:
      route: of the batch's prompts; None without a router.
      whole: totals of the whole batch.
      schedule, memory: as :func:`adapted_loss` takes them.

    Returns:
      The loss, and its parts with neither ``cross_entropy`` nor ``tokens``, which are zero.
    """
    zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    loss = objective + adapter.method.penalty(adapter.params) / whole.parts
    if route is None or whole.first_choices is None:
        shares = jnp.ones((config.num_layers, len(EXPERTS)), jnp.float32) / whole.parts
        return loss, LossParts(zero, zero, ExpertUse(shares, shares), zero, none, None)
    first = adapter.method.first_choices(memory, whole.first_choices)
    balance = load_balance(route, first, whole.prompts)
    parts = LossParts(
        cross_entropy=zero,
        load_balance=balance,
        use=ExpertUse(
            chosen=expert_share(route, whole.prompts),
            first=first_choices(route, whole.prompts),
            features=_mean_of_prompts(route.seen.sums, whole.prompts),
        ),
        pooled_max=route.seen.largest.max(),
        tokens=none,
        route=route,
    )
    return loss + schedule.load_balance * balance, parts


def totals_of(batch: Batch, route: Route | None) -> Totals:
    """The totals of a batch whose prompts have the route ``route``."""
    return Totals(
        tokens=following(batch.loss_mask).sum(),
        prompts=batch.present.sum(),
        first_choices=None if route is None else first_choices(route),
    )


def _mean_of_prompts(
    sums: Float[Array, "L 2 D"] | None, prompts: Int[Array, ""]
) -> Float[Array, "L 2 D"] | None:
    return None if sums is None else sums / jnp.maximum(prompts, 1).astype(jnp.float32)


def following(field: Shaped[Array, "B T"]) -> Shaped[Array, "B T"]:
    """The value at the next token; zero or false at the last."""
    return jnp.pad(field[:, 1:], ((0, 0), (0, 1)))


def summed_loss(
    adapter: Adapter,
    base: Base,
    config: ModelConfig,
    batch: Batch,
    loss_chunk: int = 4096,
    attend: Attend = attention,
) -> tuple[Float[Array, ""], Int[Array, ""], Route | None]:
    """Sum of the counted tokens' losses, their number, and the route, for the dev evaluation."""
    _, parts = adapted_loss(adapter, base, config, batch, key=None, loss_chunk=loss_chunk, attend=attend)
    return parts.cross_entropy * parts.tokens.astype(jnp.float32), parts.tokens, parts.route
