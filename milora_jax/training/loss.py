"""What training minimises: response cross entropy plus the load-balance term (section 3.4)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from milora_jax.adapters.protocol import Adapter
from milora_jax.adapters.router import expert_share, load_balance
from milora_jax.base.modules import Base
from milora_jax.base.transformer import forward, prompt_members, unembed
from milora_jax.config import ModelConfig
from milora_jax.shapes import Array, Bool, Float, Int, Key
from milora_jax.types import EXPERTS, Batch, Route


@struct.dataclass
class LossParts:
    """The terms of the loss and what is worth looking at beside it; see ``types.Metrics``.

    Attributes:
      route: of the batch's prompts; None without a router.
    """

    cross_entropy: Float[Array, ""]
    load_balance: Float[Array, ""]
    expert_share: Float[Array, "L E"]
    pooled_max: Float[Array, ""]
    tokens: Int[Array, ""]
    route: Route | None


def token_losses(
    base: Base, hidden: Float[Array, "B T D"], batch: Batch
) -> tuple[Float[Array, "B T1"], Bool[Array, "B T1"]]:
    """Negative log-likelihood in nats of every token but each row's first, and which of them count.

    The hidden state of token t predicts token t + 1.
    """
    logits = unembed(base, hidden[:, :-1])
    targets = batch.tokens[:, 1:]
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="clip")[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen, batch.loss_mask[:, 1:]


def adapted_loss(
    adapter: Adapter,
    base: Base,
    config: ModelConfig,
    batch: Batch,
    *,
    prompts: int,
    key: Key[Array, ""] | None,
) -> tuple[Float[Array, ""], LossParts]:
    """Mean cross entropy over the counted tokens of the global batch, plus what the method adds to it:
    lambda times Eq. 4 where it routes, and its penalty on the parameters.

    Args:
      prompts: Z, the most records packed into one row.
      key: switches dropout on.
    """
    output = forward(
        base,
        config,
        batch.tokens,
        batch.positions,
        batch.segment_ids,
        adapter=adapter,
        prompt_mask=batch.prompt_mask,
        prompts=prompts,
        key=key,
    )
    losses, counted = token_losses(base, output.hidden, batch)
    tokens = counted.sum()
    cross_entropy = jnp.where(counted, losses, 0.0).sum() / jnp.maximum(tokens, 1).astype(jnp.float32)
    loss = cross_entropy + adapter.method.penalty(adapter.params)
    if output.route is None:
        zero = jnp.zeros((), jnp.float32)
        shares = jnp.ones((config.num_layers, len(EXPERTS)), jnp.float32)
        return loss, LossParts(cross_entropy, zero, shares, zero, tokens, None)
    present = prompt_members(batch.segment_ids, batch.prompt_mask, prompts).any(axis=-1)
    balance = load_balance(output.route.probs, present)
    parts = LossParts(
        cross_entropy=cross_entropy,
        load_balance=balance,
        expert_share=expert_share(output.route.weights, present),
        pooled_max=output.route.pooled_max.max(),
        tokens=tokens,
        route=output.route,
    )
    return loss + adapter.method.balance_weight * balance, parts


def summed_loss(
    adapter: Adapter, base: Base, config: ModelConfig, batch: Batch, prompts: int
) -> tuple[Float[Array, ""], Int[Array, ""], Route | None]:
    """Sum of the counted tokens' losses, their number, and the route, for the dev evaluation."""
    _, parts = adapted_loss(adapter, base, config, batch, prompts=prompts, key=None)
    return parts.cross_entropy * parts.tokens.astype(jnp.float32), parts.tokens, parts.route
