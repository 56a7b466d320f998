"""Pretraining of the tiny base on the generated corpus: all weights, next-token cross entropy."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from milora_jax.base.hf import save_base
from milora_jax.base.hf_config import write_model_config
from milora_jax.base.load import load_base
from milora_jax.base.modules import Base, unroll
from milora_jax.base.specs import LeafSpec, base_specs
from milora_jax.base.transformer import forward, unembed
from milora_jax.console import Console
from milora_jax.model_config import ModelConfig
from milora_jax.shapes import Array, Bool, Float, Int
from milora_jax.tiny import corpus, wide
from milora_jax.tiny.corpus import Piece
from milora_jax.tiny.tokenizer import SPECIAL, VOCAB_SIZE, save_tokenizer
from milora_jax.types import Batch, stack_layers

CONFIG = ModelConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=128,
    intermediate_size=448,
    num_layers=5,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    norm_eps=1e-5,
    rope_theta=1e4,
    max_positions=512,
    eos_ids=(SPECIAL.index("</s>"),),
    tie_embeddings=True,
)
"""1.2 million parameters: the fewest that learn the corpus well in under an hour on two cores."""

SHORT, LONG = (72, 80), (40, 144)
"""Rows and tokens of a batch: short batches first, then long ones for the distances within prompts."""


@dataclass(frozen=True)
class Stage:
    """A part of the pretraining, with an optimiser of its own.

    Attributes:
      document: draws one document.
      share: share of all steps.
      short_share: share of its batches that are SHORT; the others are LONG.
      learning_rate: peak learning rate.
    """

    document: Callable[[np.random.Generator], list[Piece]]
    share: float
    short_share: float
    learning_rate: float


STAGES = (
    Stage(corpus.pieces, share=0.5, short_share=0.85, learning_rate=3e-3),
    Stage(wide.document, share=0.5, short_share=0.0, learning_rate=1.5e-3),
)
"""The stages: facts and skills first, then the same in many layouts."""

INIT_SCALE = 0.04
STORED_DTYPE = "float16"


def initial_base(seed: int) -> Base:
    """Draw normal weights, with norms of one and smaller projections into the residual stream."""
    rng = np.random.default_rng(seed)

    def draw(spec: LeafSpec) -> jax.Array:
        if "norm" in spec.parts[0].name:
            return jnp.ones(spec.shape, jnp.float32)
        writes = any(part in spec.parts[0].name for part in ("o_proj", "down_proj"))
        scale = INIT_SCALE / (2 * CONFIG.num_layers) ** 0.5 if writes else INIT_SCALE
        return jnp.asarray((rng.normal(size=spec.shape) * scale).astype(np.float32))

    return jax.tree.map(draw, base_specs(CONFIG))


def batches(
    tokenizer: Any, stage: Stage, steps: int, seed: tuple[int, int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Make rows of whole documents, each between begin- and end-of-sequence tokens, padded at the end.

    A document that fits no row is left out.

    Yields:
      Token ids ``[B, T + 1]``, and whether each of them is learnt.
    """
    rng = np.random.default_rng(seed)
    waiting: list[tuple[list[int], list[bool]]] = []
    for step in range(steps):
        rows, length = SHORT if step < stage.short_share * steps else LONG
        tokens = np.full((rows, length + 1), tokenizer.pad_token_id, np.int32)
        learnt = np.zeros(tokens.shape, bool)
        for row, marks in zip(tokens, learnt, strict=True):
            used = 0
            while True:
                if not waiting:
                    documents = [stage.document(rng) for _ in range(512)]
                    waiting = [d for d in _encode(tokenizer, documents) if len(d[0]) <= LONG[1]]
                ids, learns = waiting[-1]
                if used + len(ids) > len(row):
                    break
                row[used : used + len(ids)] = ids
                marks[used : used + len(ids)] = learns
                used += len(ids)
                waiting.pop()
        yield tokens, learnt


def _encode(tokenizer: Any, documents: list[list[Piece]]) -> Iterator[tuple[list[int], list[bool]]]:
    """Ids of each document, and whether each is learnt; pieces are tokenised separately."""
    encoded = iter(
        tokenizer([piece.text for document in documents for piece in document], add_special_tokens=False)[
            "input_ids"
        ]
    )
    for document in documents:
        ids, learns = [tokenizer.bos_token_id], [False]
        for piece in document:
            part = next(encoded)
            ids += part
            learns += [piece.learnt] * len(part)
        yield [*ids, tokenizer.eos_token_id], [*learns, True]


def cross_entropy(base: Base, tokens: Int[Array, "B T1"], learnt: Bool[Array, "B T1"]) -> Float[Array, ""]:
    """Mean next-token cross entropy in nats over the tokens that are learnt."""
    given, wanted, counted = tokens[:, :-1], tokens[:, 1:], learnt[:, 1:]
    # Attention must not reach into the document before.
    segments = jnp.cumsum(given == SPECIAL.index("<s>"), axis=1).astype(jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(given.shape[1], dtype=jnp.int32)[None, :], given.shape)
    batch = Batch(given, segments, positions, jnp.zeros(given.shape, bool), counted)
    hidden = forward(base, CONFIG, batch).hidden
    losses = optax.softmax_cross_entropy_with_integer_labels(unembed(base, CONFIG, hidden), wanted)
    return jnp.where(counted, losses, 0.0).sum() / counted.sum().astype(jnp.float32)


def pretrain(directory: Path, steps: int, seed: int, console: Console) -> float:
    """Train from scratch and write a Hugging Face directory; returns the last loss in nats.

    After every stage the model is written; the next stage starts from the written one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = save_tokenizer(directory, seed)
    base, loss = initial_base(seed), float("inf")
    for number, stage in enumerate(STAGES, 1):
        base, loss = _train(base, stage, number, round(stage.share * steps), tokenizer, seed, console)
        save_base(directory, base, CONFIG, STORED_DTYPE)
        config = write_model_config(CONFIG, SPECIAL.index("<s>"), STORED_DTYPE)
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        base, _ = load_base(directory)
    return loss


def _train(
    start: Base, stage: Stage, number: int, steps: int, tokenizer: Any, seed: int, console: Console
) -> tuple[Base, float]:
    warmup = min(100, steps // 10 + 1)
    schedule = optax.warmup_cosine_decay_schedule(0.0, stage.learning_rate, warmup, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))

    def step(base: Any, opt_state: Any, tokens: Array, learnt: Array) -> tuple[Any, Any, Array]:
        loss, gradient = jax.value_and_grad(cross_entropy)(base, tokens, learnt)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes Python numbers and arrays
            updates, opt_state = optimizer.update(gradient, opt_state, base)
        return optax.apply_updates(base, updates), opt_state, loss

    base: Any = unroll(start)  # unrolled layers compile longer and run faster on a CPU
    opt_state = optimizer.init(base)
    jitted = jax.jit(step, donate_argnums=(0, 1))
    loss = jnp.inf
    with console.progress(f"pretraining, part {number}", steps, "steps") as bar:
        for i, (tokens, learnt) in enumerate(batches(tokenizer, stage, steps, (seed, number))):
            base, opt_state, loss = jitted(base, opt_state, tokens, learnt)
            if i % 10 == 9 or i + 1 == steps:
                bar.reach(i + 1, f"loss {float(loss):.3f}")
    head = None if base.head is None else base.head[...]
    return Base(base.embedding[...], stack_layers(base.layers), base.final_norm[...], head), float(loss)
