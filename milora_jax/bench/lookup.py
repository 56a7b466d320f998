"""``python -m milora_jax.bench lookup``: what speculation by prompt look-up saves on given prompts.

Decodes the first ``--prompts`` rows of ``--rows`` greedily, with each number of proposed tokens in
``--lookup`` (0 is decoding without speculation), and reports the tokens per second, the share of proposals
that were accepted, and the share of texts that are the same as with the first number. Variants are measured
in turns. One JSON object per line and variant.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from milora_jax.base.transformer import adapter_decode_layout
from milora_jax.bench import machine
from milora_jax.bench.models import load_model
from milora_jax.bench.rounds import ModelSettings, in_turns, option
from milora_jax.data.records import read_records
from milora_jax.data.sources import Source
from milora_jax.data.tokens import encode_question, load_tokenizer
from milora_jax.errors import require
from milora_jax.generation.adapter_stack import AdapterStack
from milora_jax.generation.engine import Engine
from milora_jax.generation.request import Request
from milora_jax.generation.settings import GenerationSettings
from milora_jax.prompt_format import PromptFormat
from milora_jax.storage.imported import read_any_adapter


@dataclass(frozen=True)
class Settings(ModelSettings):
    """The settings of ``bench lookup``.

    Attributes:
      rows: JSON or JSONL file of records.
      adapter: export, workdir or PEFT directory; default: the base alone.
      template: of the prompts, without an adapter.
      lookup: tokens that are proposed at each step.
      batch_slots: texts that are decoded together.
      prompts: rows that are used.
      new: tokens of a continuation, at most.
    """

    rows: str = option("")
    adapter: str = option("")
    template: str = option("alpaca", choices=("alpaca", "chat"))
    lookup: tuple[int, ...] = option((0, 2, 4), least=0)
    batch_slots: int = option(1, least=1)
    prompts: int = option(8, least=1)
    new: int = option(64, least=1)


@dataclass(eq=False)
class Variant:
    """An engine, and what was measured with it."""

    lookup: int
    engine: Engine
    seconds: list[float] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Yield one report per number of proposed tokens."""
    require(bool(settings.rows), "--rows", settings.rows, "a file of records")
    base, config = load_model(settings.model, settings.dtype, decode=True, quantize=settings.quantize[0])
    stack, prompt_format = None, PromptFormat(template=settings.template)
    if settings.adapter:
        adapter, _ = read_any_adapter(Path(settings.adapter), Path(settings.model), settings.quantize[0])
        stack = AdapterStack.single(adapter_decode_layout(adapter, base))
        prompt_format = adapter.encoding
    tokenizer = load_tokenizer(settings.model)
    records = read_records(Source("rows", settings.rows), scored=True)[: settings.prompts]
    prompts = [encode_question(tokenizer, record, prompt_format) for record in records]
    length = min(max(len(prompt.ids) for prompt in prompts) + settings.new, config.max_positions)
    variants = [
        Variant(
            count,
            Engine(
                base,
                config,
                stack,
                batch_slots=settings.batch_slots,
                cache_length=length,
                penalties=False,
                prompt_lookup=count,
            ),
        )
        for count in settings.lookup
    ]

    def take(variant: Variant) -> None:
        most = GenerationSettings(max_new_tokens=settings.new)
        submit = functools.partial(variant.engine.submit, settings=most)
        begun = time.perf_counter()
        variant.requests = [submit(prompt.ids, route_tokens=prompt.route_tokens) for prompt in prompts]
        variant.engine.run()
        variant.seconds.append(time.perf_counter() - begun)

    for variant in variants:
        take(variant)  # compiles
        variant.seconds.clear()
    bandwidth = in_turns(variants, settings.repeats, take, machine.measure_bandwidth)
    texts = [[request.tokens for request in variant.requests] for variant in variants]
    chosen = ("model", "rows", "adapter", "batch_slots", "prompts", "new", "repeats")
    for variant, mine in zip(variants, texts, strict=True):
        tokens = sum(len(sample) for text in mine for sample in text)
        proposed = sum(request.proposed_tokens for request in variant.requests)
        accepted = sum(request.accepted_tokens for request in variant.requests)
        seconds = zip(variants[0].seconds, variant.seconds, strict=True)
        yield {
            "what": "lookup",
            **{name: getattr(settings, name) for name in chosen},
            "lookup": variant.lookup,
            "tokens_per_second": tokens / statistics.median(variant.seconds),
            "speedup": statistics.median(first / own for first, own in seconds),
            "acceptance_rate": accepted / proposed if proposed else None,
            "accepted_share_of_tokens": accepted / tokens,
            "same_texts": sum(map(list.__eq__, mine, texts[0])) / len(texts[0]),
            "bandwidth_gb_s": bandwidth / 1e9,
            **machine.describe(),
        }
