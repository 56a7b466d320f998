"""A fixed route in place of a router, and its cost: for servers that support LoRA but no router.

The *modal* route of a file of prompts is, layer by layer, the set of experts that most prompts chose. The
weight of an expert of the set is its mean in those prompts: 1 with the straight-through gate.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from milora_jax.adapters.protocol import Adapter
from milora_jax.base.modules import Base
from milora_jax.base.transformer import adapter_decode_layout
from milora_jax.data.batches import collate, padded_length
from milora_jax.data.records import Record
from milora_jax.data.tokens import Example, encode_question, encode_records
from milora_jax.generation.settings import GenerationSettings
from milora_jax.generation.text import generate
from milora_jax.model_config import ModelConfig
from milora_jax.prompt_format import PromptFormat
from milora_jax.shapes import Float
from milora_jax.storage.fixed import static_lora
from milora_jax.training.loss import summed_loss
from milora_jax.types import EXPERTS

LENGTH_MULTIPLE = 32


@dataclass(frozen=True)
class Model:
    """A base and everything that turns text into its tokens.

    Attributes:
      base: in the decode layout.
      prompt_format: the format of the adapter's training.
      batch_size: rows of a batch.
    """

    base: Base
    config: ModelConfig
    tokenizer: Any
    prompt_format: PromptFormat
    batch_size: int


@dataclass(frozen=True)
class StaticRoute:
    """The modal route of a file of prompts.

    Attributes:
      weights: weights of the experts; 0 for those outside the set.
      share: share of the prompts that chose each layer's set.
      prompts: number of prompts in the file.
    """

    weights: Float[np.ndarray, "L E"]
    share: Float[np.ndarray, " L"]
    prompts: int

    def lines(self) -> list[str]:
        """One line per layer, for people."""
        return [
            f"layer {i:2d}: {' '.join(e for e, w in zip(EXPERTS, row, strict=True) if w):24s} "
            f"{100 * share:3.0f}% of prompts"
            for i, (row, share) in enumerate(zip(self.weights, self.share, strict=True))
        ]


@dataclass(frozen=True)
class StaticReport:
    """The effect of the fixed route, on the same dev rows.

    Attributes:
      perplexity_base, perplexity_routed, perplexity_static: perplexities of the responses, under the plain
        base, the routed adapter and the static one.
      same_answers: share of prompts whose greedy answers, routed and static, are the same tokens.
      rows: number of dev rows, of which ``dropped`` were too long for a perplexity.
    """

    perplexity_base: float
    perplexity_routed: float
    perplexity_static: float
    same_answers: float
    rows: int
    dropped: int

    def line(self) -> str:
        """The report as a line for people."""
        return (
            f"dev perplexity: base {self.perplexity_base:.3f}, routed {self.perplexity_routed:.3f}, "
            f"static {self.perplexity_static:.3f}; "
            f"{100 * self.same_answers:.1f}% of {self.rows} greedy answers are the same"
        )


def modal_route(routes: Sequence[Float[np.ndarray, "L E"]]) -> StaticRoute:
    """The modal route of prompts' routes.

    Ties between sets go to the one whose experts were chosen more often.
    """
    every = np.stack(routes)
    chosen = every != 0
    popularity = chosen.sum(axis=0)
    weights, shares = np.zeros(every.shape[1:], np.float32), []
    for layer in range(every.shape[1]):
        counts = Counter(map(tuple, chosen[:, layer].tolist()))
        best = max(sorted(counts), key=lambda mask: (counts[mask], popularity[layer][list(mask)].sum()))
        takers = (chosen[:, layer] == np.array(best)).all(axis=-1)
        weights[layer] = every[takers, layer].mean(axis=0)
        shares.append(takers.mean())
    return StaticRoute(weights, np.array(shares, np.float32), len(routes))


def calibrated_route(
    model: Model, adapter: Adapter, records: Sequence[Record], log: Callable[[str], None]
) -> StaticRoute:
    """The modal route of records' prompts under an adapter that routes."""
    log(f"routing {len(records)} calibration prompts")
    answers = _answers(model, adapter, records, GenerationSettings(max_new_tokens=1))
    return modal_route([answer.route for answer in answers if answer.route is not None])


def static_report(
    model: Model,
    adapter: Adapter,
    route: StaticRoute,
    records: Sequence[Record],
    max_length: int,
    max_new_tokens: int,
    log: Callable[[str], None],
) -> StaticReport:
    """Perplexities and greedy answers on dev rows, routed and static.

    Args:
      adapter: a MiLoRA in the stacked layout.
      max_length: longest row of the perplexities in tokens.
    """
    static = static_lora(adapter, route.weights)
    nothing = static_lora(adapter, np.zeros_like(route.weights))
    examples, dropped = encode_records(
        model.tokenizer, records, model.config, max_length, model.prompt_format
    )
    log(f"dev perplexity of base, routed adapter and static route ({len(examples)} rows)")
    base, routed, fixed = (
        perplexity(model, mine, examples, max_length) for mine in (nothing, adapter, static)
    )
    settings = GenerationSettings(max_new_tokens=max_new_tokens)
    log(f"greedy answers to {len(records)} dev prompts, routed and static")
    pairs = zip(*(_answers(model, mine, records, settings) for mine in (adapter, static)), strict=True)
    same = [ours.tokens == theirs.tokens for ours, theirs in pairs]
    return StaticReport(base, routed, fixed, sum(same) / len(same), len(records), dropped)


def perplexity(model: Model, adapter: Adapter, examples: Sequence[Example], max_length: int) -> float:
    """exp of the mean loss over all response tokens."""
    longest = max(len(example.tokens) for example in examples)
    length, size = padded_length(longest, LENGTH_MULTIPLE, max_length), model.batch_size
    total, count = 0.0, 0
    adapter = adapter_decode_layout(adapter, model.base)
    for start in range(0, len(examples), size):
        rows = [[example] for example in examples[start : start + size]]
        batch = collate(rows, length, size)
        loss, tokens = _loss(adapter, model.base, jax.tree.map(jnp.asarray, batch), model.config)
        total, count = total + float(loss), count + int(tokens)
    return math.exp(total / count)


@functools.partial(jax.jit, static_argnames="config")
def _loss(adapter: Adapter, base: Base, batch: Any, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    return summed_loss(adapter, base, config, batch)[:2]


def _answers(model: Model, adapter: Adapter, records: Sequence[Record], settings: GenerationSettings) -> list:
    prompts = [encode_question(model.tokenizer, record, model.prompt_format) for record in records]
    return generate(
        model.base,
        model.config,
        model.tokenizer,
        prompts,
        adapter=adapter,
        settings=settings,
        batch_size=model.batch_size,
    )


def report_json(route: StaticRoute, report: StaticReport | None) -> dict[str, Any]:
    """The JSON beside an export: the route, how common it is, and the measurements."""
    return {
        "experts": list(EXPERTS),
        "weights": route.weights.tolist(),
        "share_of_prompts": route.share.tolist(),
        "prompts": route.prompts,
        "measured": None if report is None else dataclasses.asdict(report),
    }
