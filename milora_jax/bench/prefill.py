"""``python -m milora_jax.bench prefill``: what long prompts cost others, and what a prefix cache saves.

``--case streams`` decodes ``--streams`` texts while prompts of ``--prompt`` tokens arrive one by one. It
reports the time between two tokens of a stream as a multiple of a decode step without them, for each
``--budget`` (tokens of prompts between two chunks of decode steps; 0 prefills a prompt in one program).

``--case turns`` continues a chat of ``--turns`` turns whose route is that of its first turn, and reports the
time to the first token of each turn, with the prefix cache and without it.

``--case lengths`` answers ``--shorts`` prompts of ``--short`` tokens, ``--prompts`` of ``--prompt`` tokens,
and all of them together by ``generation.text.generate``, and reports the time of the last over the sum of the
others.

Variants are measured in turns. One JSON object per line and variant.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from milora_jax.adapters.protocol import Adapter
from milora_jax.base.modules import Base
from milora_jax.base.transformer import adapter_decode_layout
from milora_jax.bench import machine
from milora_jax.bench.models import load_model, random_adapter
from milora_jax.bench.rounds import ModelSettings, in_turns, option
from milora_jax.config import AdapterSection
from milora_jax.data.tokens import load_tokenizer
from milora_jax.errors import UserError
from milora_jax.generation.adapter_stack import AdapterStack
from milora_jax.generation.engine import Engine
from milora_jax.generation.request import Request
from milora_jax.generation.settings import GenerationSettings
from milora_jax.generation.text import generate
from milora_jax.model_config import ModelConfig

CASES = ("streams", "turns", "lengths")
ALONE = 20
"""Chunks of decode steps that are measured without long prompts."""

FIRST_ID = 16
"""Of the random token ids: those below may be special."""


@dataclass(frozen=True)
class Settings(ModelSettings):
    """The settings of ``bench prefill``.

    Attributes:
      case: what is measured.
      method: method of the adapter; none for the base alone.
      rank: of the adapter.
      budget: tokens of prompts between two chunks.
      chunk: decode steps of a chunk.
      streams: texts that are decoded.
      prompt: tokens of a long prompt.
      prompts: how many of them arrive in a round.
      short: tokens of a short prompt.
      shorts: how many of them are answered beside the long ones.
      turns: turns of a chat.
      turn: tokens that a user writes in a turn.
      new: tokens of an answer.
      cache: mebibytes of the prefix cache.
    """

    case: tuple[str, ...] = option(CASES, choices=CASES)
    method: str = option("milora", choices=("none", "lora", "milora"))
    rank: int = option(8, least=1)
    budget: tuple[int, ...] = option((0, 64, 128), least=0)
    chunk: int = option(8, least=1)
    streams: int = option(7, least=1)
    prompt: int = option(1800, least=1)
    prompts: int = option(2, least=1)
    short: int = option(64, least=1)
    shorts: int = option(10, least=1)
    turns: int = option(10, least=2)
    turn: int = option(60, least=1)
    new: int = option(40, least=1)
    cache: int = option(512, least=1)


@dataclass(eq=False)
class Variant:
    """An engine and what was measured with it.

    Attributes:
      name: what is special about it.
      gaps: seconds between the tokens of the streams, by round; while a long prompt was there.
      steps: the same without long prompts.
      first: seconds to the first token, of the long prompts or of each turn, by round.
      cached: tokens of each turn that were found.
    """

    name: dict[str, Any]
    engine: Engine
    gaps: list[list[float]] = field(default_factory=list)
    steps: list[list[float]] = field(default_factory=list)
    first: list[list[float]] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Measure all variants and yield a report of each."""
    base, config = load_model(settings.model, settings.dtype, decode=True, quantize=settings.quantize[0])
    stack = None
    if settings.method != "none":
        section = AdapterSection(method=settings.method, rank=settings.rank)
        stack = AdapterStack.single(adapter_decode_layout(random_adapter(base, config, section, 0), base))
    if "streams" in settings.case:
        yield from _measure_streams(settings, base, config, stack)
    if "turns" in settings.case:
        yield from _measure_turns(settings, base, config, stack)
    if "lengths" in settings.case:
        yield _measured_lengths(settings, base, config, stack)


def _measured_lengths(
    settings: Settings, base: Base, config: ModelConfig, stack: AdapterStack | None
) -> dict[str, Any]:
    """The report of prompts of very different lengths, apart and together."""
    _require_room(config, max(settings.prompt, settings.short) + settings.new)
    tokenizer = load_tokenizer(settings.model)
    adapter = None if stack is None else Adapter(stack.params, stack.method, stack.shape)
    rng = np.random.default_rng(0)

    def prompts(count: int, length: int) -> list[list[int]]:
        return rng.integers(FIRST_ID, config.vocab_size, (count, length)).tolist()

    short, long = prompts(settings.shorts, settings.short), prompts(settings.prompts, settings.prompt)
    asked = {"short": short, "long": long, "together": [*short[:5], *long, *short[5:]]}
    answer = GenerationSettings(max_new_tokens=settings.new, ignore_eos=True)
    seconds: dict[str, list[float]] = {name: [] for name in asked}

    def take(name: str) -> None:
        begun = time.perf_counter()
        generate(base, config, tokenizer, asked[name], adapter=adapter, settings=answer, prefill_rows=4)
        seconds[name].append(time.perf_counter() - begun)

    for name in asked:
        take(name)  # compiles
        seconds[name].clear()
    bandwidth = in_turns(list(asked), settings.repeats, take, machine.measure_bandwidth)
    rounds = zip(*(seconds[name] for name in ("together", "short", "long")), strict=True)
    chosen = ("model", "method", "rank", "prompt", "prompts", "short", "shorts", "new", "repeats")
    return {
        "what": "prefill",
        "case": "lengths",
        **{name: getattr(settings, name) for name in chosen},
        "seconds": {name: statistics.median(each) for name, each in seconds.items()},
        "together_over_parts": statistics.median(both / (one + other) for both, one, other in rounds),
        "bandwidth_gb_s": bandwidth / 1e9,
        **machine.describe(),
    }


def _measure_streams(
    settings: Settings, base: Base, config: ModelConfig, stack: AdapterStack | None
) -> Iterator[dict[str, Any]]:
    length = max(settings.prompt, ALONE * settings.chunk) + 64
    _require_room(config, length)
    variants = [
        Variant(
            {"budget": budget},
            Engine(
                base,
                config,
                stack,
                batch_slots=settings.streams + 1,
                cache_length=length,
                chunk=settings.chunk,
                prefill_budget=budget,
            ),
        )
        for budget in settings.budget
    ]
    for variant in variants:
        _stream_round(settings, variant.engine)  # compiles
    bandwidth = in_turns(
        variants,
        settings.repeats,
        functools.partial(_take_streams, settings),
        machine.measure_bandwidth,
    )
    for variant in variants:
        gaps = [np.percentile(each, (50, 99)) for each in variant.gaps]
        steps = [statistics.median(each) for each in variant.steps]
        ratios = [(p50 / step, p99 / step) for (p50, p99), step in zip(gaps, steps, strict=True)]
        yield {
            "what": "prefill",
            "case": "streams",
            **_described(settings, variant),
            "step_ms": 1e3 * statistics.median(steps),
            "gap_p50_steps": statistics.median(p50 for p50, _ in ratios),
            "gap_p99_steps": statistics.median(p99 for _, p99 in ratios),
            "first_token_s": statistics.median(map(statistics.median, variant.first)),
            "bandwidth_gb_s": bandwidth / 1e9,
            **machine.describe(),
        }


def _take_streams(settings: Settings, variant: Variant) -> None:
    gaps, steps, first = _stream_round(settings, variant.engine)
    variant.gaps.append(gaps)
    variant.steps.append(steps)
    variant.first.append(first)


def _stream_round(settings: Settings, engine: Engine) -> tuple[list[float], list[float], list[float]]:
    """Seconds between tokens beside long prompts and without them, and to the first tokens of these."""
    rng = np.random.default_rng(0)
    alone = ALONE * settings.chunk
    most = GenerationSettings(max_new_tokens=engine.cache_length - 8, ignore_eos=True)
    streams = [engine.submit(_ids(rng, engine, 8), most) for _ in range(settings.streams)]
    while not all(stream.tokens[0] for stream in streams):
        engine.step()
    steps = _gaps(engine, streams, lambda count: count >= alone)
    gaps, first = [], []
    for _ in range(settings.prompts):
        begun = time.perf_counter()
        prompt = _ids(rng, engine, settings.prompt)
        long = engine.submit(prompt, GenerationSettings(max_new_tokens=1, ignore_eos=True))
        gaps += _gaps(engine, streams, lambda _, long=long: bool(long.tokens[0]))
        while not long.done:  # the streams may have ended before
            engine.step()
        first.append(time.perf_counter() - begun)
    for stream in streams:
        engine.end(stream, 0, "cancelled")
    engine.run()
    return gaps, steps, first


def _gaps(engine: Engine, streams: Sequence[Request], ended: Any) -> list[float]:
    """Seconds between two tokens of the first stream, for each, until ``ended(tokens)`` or its own end."""
    stream, found = streams[0], []
    before = len(stream.tokens[0])
    last, count = time.perf_counter(), 0
    while not (ended(count) or stream.done):
        engine.step()
        fresh = len(stream.tokens[0]) - before - count
        if fresh:
            now = time.perf_counter()
            found += [(now - last) / fresh] * fresh
            last, count = now, count + fresh
    return found


def _measure_turns(
    settings: Settings, base: Base, config: ModelConfig, stack: AdapterStack | None
) -> Iterator[dict[str, Any]]:
    length = settings.turns * (settings.turn + settings.new)
    _require_room(config, length)
    caches = (0, settings.cache * 2**20)
    variants = [
        Variant(
            {"prefix_cache": bool(cache)},
            Engine(
                base,
                config,
                stack,
                batch_slots=1,
                cache_length=length,
                prefill_budget=max(settings.budget) if cache else 0,
                prefix_cache=cache,
            ),
        )
        for cache in caches
    ]
    for variant in variants:
        _turns_round(settings, variant.engine)
    bandwidth = in_turns(
        variants, settings.repeats, functools.partial(_take_turns, settings), machine.measure_bandwidth
    )
    for variant in variants:
        yield {
            "what": "prefill",
            "case": "turns",
            **_described(settings, variant),
            "first_token_s": [statistics.median(each) for each in zip(*variant.first, strict=True)],
            "cached_tokens": variant.cached,
            "bandwidth_gb_s": bandwidth / 1e9,
            **machine.describe(),
        }


def _take_turns(settings: Settings, variant: Variant) -> None:
    seconds, variant.cached = _turns_round(settings, variant.engine)
    variant.first.append(seconds)


def _turns_round(settings: Settings, engine: Engine) -> tuple[list[float], list[int]]:
    """Seconds to the first token of each turn of one chat, and the tokens that were found."""
    if engine.prefix_cache is not None:
        engine.prefix_cache.clear()
    rng = np.random.default_rng(0)
    chat, seconds, cached = list[int](), list[float](), list[int]()
    for _ in range(settings.turns):
        chat += _ids(rng, engine, settings.turn)
        answer = GenerationSettings(max_new_tokens=settings.new, ignore_eos=True)
        begun = time.perf_counter()
        request = engine.submit(chat, answer, cache_scope="chat", route_tokens=settings.turn)
        while not request.tokens[0]:
            engine.step()
        seconds.append(time.perf_counter() - begun)
        cached.append(request.cached_tokens)
        engine.run()
        chat += request.tokens[0]
    return seconds, cached


def _described(settings: Settings, variant: Variant) -> dict[str, Any]:
    chosen = ("model", "method", "rank", "chunk", "streams", "prompt", "turns", "turn", "new", "repeats")
    return {**{name: getattr(settings, name) for name in chosen}, **variant.name}


def _require_room(config: ModelConfig, length: int) -> None:
    if length > config.max_positions:
        raise UserError(f"{length} tokens are more than the model's {config.max_positions} positions")


def _ids(rng: np.random.Generator, engine: Engine, count: int) -> list[int]:
    return rng.integers(FIRST_ID, engine.config.vocab_size, count).tolist()
