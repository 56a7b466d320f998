"""The dimension legend and the values that pass between packages.

Dimension letters, used in every shape comment, jaxtyping string and einsum of the project:

=====  =========================================================
L      layers
B      rows of a batch
T      tokens of a row (query positions)
S      cache length (key positions)
Z      prompts packed into one row; 1 unless rows are packed
A      answers to a prompt: 2 with a preference objective, else 1
D      embedding width of the residual stream
F      width of the feed-forward layer
N      query heads
K      key and value heads
G      query heads per key head, N / K
H      width of a head
R      rank of a low-rank pair
E      experts of a layer, always 7
X      experts of the base in a layer; 0 in a dense base
C      experts of the base that a token goes through
V      vocabulary
=====  =========================================================

Routing weights are never called gates here: ``gate`` is the SwiGLU projection.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from milora_jax.shapes import Array, Bool, Float, Int

EXPERTS: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
"""The seven linear modules of a layer, each one expert: the paper's Q K V O G U D (section 3)."""

LETTERS = tuple(name[0].upper() for name in EXPERTS)
"""The paper's names of the experts, Q K V O G U D, in their order."""

GROUPS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
"""Projection groups: modules that share an input, in the order a layer evaluates them."""

FEEDFORWARD = ("gate", "up", "down")
"""The modules of the feed-forward layer, of which a base with experts has one per expert."""

PyTree: TypeAlias = Any
"""A tree of arrays whose structure an annotation cannot express."""


@struct.dataclass
class Batch:
    """Rows of tokens with everything that the model must know about them.

    Attributes:
      tokens: token ids; padding holds any valid id.
      segment_ids: 0 for padding, 1..Z for the records packed into the row; with two answers to a prompt, 1
        and 2 are those to the first, 3 and 4 those to the second, each behind its own copy of the prompt.
      positions: position of each token within its own record, from 0.
      prompt_mask: true on the tokens that the routers read: those of the prompt, or of the part of it that
        ``adapter.route_on`` names; false on response and padding.
      loss_mask: true on the tokens that are *predicted* and count: response and end-of-sequence.
      labels: of rows with two answers to a prompt: whether the first answer is desirable; None otherwise.
      prompts: Z, the most prompts packed into one row; static, as a shape is.
      answers: A, the answers to each prompt, which share its route; static, 1 or 2.
    """

    tokens: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    prompt_mask: Bool[Array, "B T"]
    loss_mask: Bool[Array, "B T"]
    labels: Bool[Array, "B Z"] | None = None
    prompts: int = struct.field(pytree_node=False, default=1)
    answers: int = struct.field(pytree_node=False, default=1)

    @classmethod
    def unpadded(cls, tokens: Int[Array, "B T"], positions: Int[Array, "B T"] | None = None) -> Batch:
        """Full rows of one record each, without a prompt, as for a decode step or the plain base.

        Args:
          positions: None counts from 0 in each row.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
        no = jnp.zeros(tokens.shape, bool)
        return cls(tokens, jnp.ones_like(tokens), positions, no, no)

    @property
    def members(self) -> Bool[Array, "B Z T"]:
        """Whether each token belongs to each prompt, as it stands before its first answer."""
        record = jnp.arange(1, self.segments + 1, self.answers)[None, :, None]
        return (self.segment_ids[:, None, :] == record) & self.prompt_mask[:, None, :]

    @property
    def segments(self) -> int:
        """The largest of ``segment_ids``."""
        return self.prompts * self.answers

    @property
    def present(self) -> Bool[Array, "B Z"]:
        """Whether each prompt exists; false for filler rows and for unused places of a row."""
        return self.members.any(axis=-1)


@struct.dataclass
class RouterInputs:
    """Statistics of what the routers read of each prompt, for reports; no gradient, and 0 without a prompt.

    Attributes:
      largest: largest absolute value that entered the activation.
      spread: root mean square of the features before they are limited to the activation's range. For
        standardized features it is 1 over the prompts on which they were measured, and larger for prompts
        whose features have drifted from the statistics.
      token_share: largest share of one token in the self-attention pooler; None with the other poolers.
      sums: sums over all prompts of the standardized features before they are limited, and of their squares;
        None with other features.
    """

    largest: Float[Array, "*L B Z"]
    spread: Float[Array, "*L B Z"]
    token_share: Float[Array, "*L B Z"] | None
    sums: Float[Array, "*L 2 D"] | None


@struct.dataclass
class Route:
    """Which experts act on which prompt, chosen once per prompt (paper, Eq. 2 and 3).

    In the stacked layout every leaf carries a leading layer axis; inside a layer none does.

    Attributes:
      weights: factor of each expert's output; 0 where the expert is not chosen.
      probs: softmax of the router, for the load-balance term and for reports.
      present: whether each prompt exists; the other leaves are meaningless where it does not.
      seen: statistics of the router's inputs.
    """

    weights: Float[Array, "*L B Z E"]
    probs: Float[Array, "*L B Z E"]
    present: Bool[Array, "*L B Z"]
    seen: RouterInputs


@struct.dataclass
class PreferenceSums:
    """Sums over the prompts of a batch, by which a preference objective is reported; see docs/tuning.md.

    Attributes:
      loss: the objective's term of each prompt, without orpo's cross entropy.
      prompts: number of prompts.
      chosen, rejected: rewards of the preferred or desirable answers, and of the others.
      chosen_count, rejected_count: number of these answers.
      accurate: number of prompts whose answers have the rewards that the rows ask for.
      kl: log-ratios of the answers of other prompts, for kto's estimate of the divergence; else 0.
      nll: negative log-likelihood of the tokens that are imitated, in nats.
      tokens: number of these tokens.
    """

    loss: Float[Array, ""]
    prompts: Int[Array, ""]
    chosen: Float[Array, ""]
    rejected: Float[Array, ""]
    chosen_count: Int[Array, ""]
    rejected_count: Int[Array, ""]
    accurate: Int[Array, ""]
    kl: Float[Array, ""]
    nll: Float[Array, ""]
    tokens: Int[Array, ""]


@struct.dataclass
class Metrics:
    """The figures of one training step; every leaf is a scalar unless a shape is given.

    Attributes:
      loss: the objective, for supervised tuning the cross entropy, plus the weighted auxiliary term.
      cross_entropy: mean negative log-likelihood of the counted tokens, in nats.
      load_balance: Eq. 4 averaged over layers; 0 for methods without a router.
      grad_norm: global L2 norm before clipping.
      router_grad_norm: the norm of the routers' leaves alone; 0 without a router.
      expert_share: share of the batch's prompts that chose each expert, ``[L, E]``.
      pooled_max: largest absolute value that entered a router's activation.
      tokens: number of counted tokens.
      bad_steps: updates skipped in a row, up to and including this one.
      preference: figures of a preference objective; None for supervised tuning.
    """

    loss: Float[Array, ""]
    cross_entropy: Float[Array, ""]
    load_balance: Float[Array, ""]
    grad_norm: Float[Array, ""]
    router_grad_norm: Float[Array, ""]
    expert_share: Float[Array, "L E"]
    pooled_max: Float[Array, ""]
    tokens: Int[Array, ""]
    bad_steps: Int[Array, ""]
    preference: PreferenceSums | None = None


def unstack_layers(stacked: PyTree) -> tuple[PyTree, ...]:
    """Turn a tree stacked on a leading layer axis into a tuple with one tree per layer.

    The training layout becomes the decoding layout; :func:`stack_layers` is the exact inverse.
    """
    leaves, structure = jax.tree.flatten(stacked)
    return tuple(jax.tree.unflatten(structure, layer) for layer in zip(*leaves, strict=True))


def stack_layers(layers: tuple[PyTree, ...]) -> PyTree:
    """Stack a tuple of per-layer trees on a leading layer axis; inverse of :func:`unstack_layers`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


KEPT = "kept"
"""Name of the values that are kept for the backward pass under ``remat="products"``; see :func:`kept`."""


def kept(tree: PyTree) -> PyTree:
    """Mark values that are expensive to compute again, results of large matrix products, and return them."""
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, KEPT), tree)
