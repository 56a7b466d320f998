"""Log-probabilities of the tokens of a prompt, from the residual stream of its prefill."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import struct

from milora_jax.base.modules import Base
from milora_jax.base.transformer import unembed
from milora_jax.generation.request import Request, TokenLogprobs
from milora_jax.generation.settings import MOST_LOGPROBS
from milora_jax.model_config import ModelConfig
from milora_jax.shapes import Array, Float, Int

LOGITS_TOKENS = 32
"""Number of prompt tokens whose logits exist at a time."""


@struct.dataclass
class PromptLogprobs:
    """Log-probabilities of prompts; the entry at t is of token t + 1, and the last entries have no meaning.

    Attributes:
      logprob: log-probabilities of the prompt's own tokens.
      top_tokens, top_logprobs: the most probable tokens, in descending order.
    """

    logprob: Float[Array, "R T"]
    top_tokens: Int[Array, "R T n"]
    top_logprobs: Float[Array, "R T n"]

    def of_row(self, row: int, request: Request) -> tuple[TokenLogprobs, ...]:
        """Return those of the request whose prompt is in a row, read on the host."""
        count, most = len(request.prompt) - 1, request.settings.prompt_logprobs
        own = self.logprob[row, :count].tolist()
        tokens = self.top_tokens[row, :count, :most].tolist()
        values = self.top_logprobs[row, :count, :most].tolist()
        return tuple(
            TokenLogprobs(mine, tuple(zip(*tops, strict=True)))
            for mine, *tops in zip(own, tokens, values, strict=True)
        )


@functools.partial(jax.jit, static_argnames="config")
def prompt_logprobs(
    base: Base, config: ModelConfig, hidden: Float[Array, "R T D"], following: Int[Array, "R T"]
) -> PromptLogprobs:
    """Compute log-probabilities of prompts, one block of tokens at a time.

    Args:
      base: its layers are not read.
      hidden: normed residual stream.
      following: the token after each.
    """
    rows, length = following.shape
    blocks = -(-length // LOGITS_TOKENS)

    def in_blocks(array: Array) -> Array:
        padding = ((0, 0), (0, blocks * LOGITS_TOKENS - length)) + ((0, 0),) * (array.ndim - 2)
        return jnp.pad(array, padding).reshape(rows, blocks, LOGITS_TOKENS, *array.shape[2:]).swapaxes(0, 1)

    def together(array: Array) -> Array:
        return array.swapaxes(0, 1).reshape(rows, blocks * LOGITS_TOKENS, *array.shape[3:])[:, :length]

    def of_block(_: None, block: tuple[Array, Array]) -> tuple[None, PromptLogprobs]:
        states, wanted = block
        logprobs = jax.nn.log_softmax(unembed(base, config, states), axis=-1)
        mine = jnp.take_along_axis(logprobs, wanted[..., None], axis=-1)[..., 0]
        top_logprobs, top_tokens = jax.lax.top_k(logprobs, min(MOST_LOGPROBS, logprobs.shape[-1]))
        return None, PromptLogprobs(mine, top_tokens, top_logprobs)

    _, found = jax.lax.scan(of_block, None, (in_blocks(hidden), in_blocks(following)))
    return jax.tree.map(together, found)
