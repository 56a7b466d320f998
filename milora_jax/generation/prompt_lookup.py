"""Speculation by prompt look-up: a row's text proposes its own next tokens.

Where the last tokens of a row occurred in its text before, what followed them there is proposed, and one pass
of the model checks all that is proposed: tokens that the row would have got in any case are kept, as if there
had been a pass for each (arXiv 2304.04487; Saxena, "Prompt Lookup Decoding", 2023). There is no second model,
and no token is chosen otherwise than without proposals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct

from milora_jax.generation.sampling import NO_TOKEN
from milora_jax.shapes import Array, Bool, Int

MOST_PROPOSALS = 32
"""Most tokens that a row may propose at a step; each is one more choice in the compiled program."""

LONGEST_MATCH = 3
"""Most tokens that are compared; of equally long matches the last one is used."""


@struct.dataclass
class PromptLookup:
    """The texts of a batch.

    Attributes:
      text: prompt and continuation of each row, up to its last token; what is behind that has no meaning.
      allowed: rows that get proposals. A constrained row gets none: the host allows one token at a time.
      count: D, tokens that are proposed at each step.
    """

    text: Int[Array, "B S"]
    allowed: Bool[Array, " B"]
    count: int = struct.field(pytree_node=False)

    @classmethod
    def of(
        cls, prompts: Sequence[Sequence[int]], allowed: Sequence[bool], length: int, count: int
    ) -> PromptLookup:
        """Return the texts of prompts that have not been continued, as host arrays.

        Args:
          length: S, positions of the longest text.
        """
        text = np.full((len(prompts), length), NO_TOKEN, np.int32)
        for row, prompt in enumerate(prompts):
            text[row, : len(prompt)] = prompt
        leaves: tuple[Any, Any] = text, np.array(allowed)
        return cls(*leaves, count)

    def proposals(self, position: Int[Array, " B"]) -> Int[Array, "B D"]:
        """Return the tokens that may follow; -1 where a row has nothing to propose.

        A match close to the end is continued periodically, as in a text that repeats itself.

        Args:
          position: position of each row's last token in its text.
        """
        places = jnp.arange(self.text.shape[1])[None, :]
        matched = jnp.zeros(self.text.shape, jnp.int32)
        alike = jnp.broadcast_to(places < position[:, None], self.text.shape)
        for back in range(LONGEST_MATCH):
            token = jnp.take_along_axis(self.text, jnp.maximum(position - back, 0)[:, None], axis=1)
            before = jnp.roll(self.text, back, axis=1)
            alike = alike & (before == jnp.broadcast_to(token, before.shape)) & (places >= back)
            matched = matched + alike.astype(jnp.int32)
        score = jnp.where(matched > 0, matched * self.text.shape[1] + places, -1)
        place = jnp.argmax(score, axis=1)
        found = (score.max(axis=1) >= 0) & self.allowed
        period = jnp.maximum(position - place, 1)
        ahead = place[:, None] + 1 + jnp.arange(self.count)[None, :] % period[:, None]
        following = jnp.take_along_axis(self.text, ahead, axis=1, mode="clip")
        return jnp.where(found[:, None], following, NO_TOKEN)

    def noted(
        self, token: Int[Array, " B"], position: Int[Array, " B"], live: Bool[Array, " B"]
    ) -> PromptLookup:
        """Return the texts after the live rows got a token at a position."""
        rows, length = jnp.arange(token.shape[0]), self.text.shape[1]
        text = self.text.at[rows, jnp.where(live, position, length)].set(token, mode="drop")
        return dataclasses.replace(self, text=text)
