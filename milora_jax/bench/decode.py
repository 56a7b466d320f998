"""``python -m milora_jax.bench decode``: the speed of decoding.

Several values of ``--method``, ``--batch``, ``--beams``, ``--tenants``, ``--rank``, ``--top-k`` and
``--quantize``, separated by commas, are measured side by side: every round runs each of them once, in turn,
so that disturbances of the machine affect all alike. One JSON object per line and variant.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from milora_jax.base.modules import Base
from milora_jax.base.transformer import adapter_decode_layout
from milora_jax.bench import machine
from milora_jax.bench.models import (
    RECOMPUTED,
    Recomputed,
    bytes_of,
    load_model,
    peer_directory,
    random_adapter,
    streamed_bytes,
)
from milora_jax.bench.peer import PEERS, started
from milora_jax.bench.rounds import ModelSettings, in_turns, option
from milora_jax.config import AdapterSection
from milora_jax.errors import UserError, require
from milora_jax.generation.adapter_stack import KERNELS, AdapterStack
from milora_jax.generation.bank import Bank
from milora_jax.generation.beam import beam_search
from milora_jax.generation.engine import CHUNK, Engine
from milora_jax.generation.settings import GenerationSettings
from milora_jax.model_config import ModelConfig
from milora_jax.types import EXPERTS, unstack_layers

METHODS = ("none", "lora", "dora", "dora-recomputed", "moelora", "milora", "midora", *PEERS)


@dataclass(frozen=True)
class Variant:
    """One combination of settings that is measured."""

    method: str
    batch: int
    beams: int
    tenants: int
    rank: int
    top_k: int
    quantize: str


@dataclass
class Case:
    """A variant ready to run.

    Attributes:
      run: continues the prompts by a number of tokens.
      base: the base; None for a peer.
      tenants: the adapters on the base.
      peer: versions of the peer that runs the variant instead of this package.
    """

    variant: Variant
    run: Callable[[int], None]
    base: Base | None
    tenants: AdapterStack | None
    peer: dict[str, str] | None = None
    compile_s: float = 0.0
    whole: list[float] = dataclasses.field(default_factory=list)
    first: list[float] = dataclasses.field(default_factory=list)


@dataclass(frozen=True)
class Settings(ModelSettings):
    """The settings of ``bench decode``.

    Attributes:
      method: method of the adapters.
      batch: number of prompts.
      prompt: tokens of a prompt.
      new: tokens of a continuation.
      beams: width of the search; 1 is greedy.
      tenants: number of adapters in the batch.
      rank: rank of a module's matrices, of all experts together.
      top_k: experts that MiLoRA and MiDoRA choose.
      path: how rows find their adapters; empty: the suitable one.
      prefill_rows: prompts prefilled together.
      chunk: decode steps per compiled chunk.
    """

    method: tuple[str, ...] = option(("milora",), choices=METHODS)
    batch: tuple[int, ...] = option((1,), least=1)
    prompt: int = option(64, least=1)
    new: int = option(64, least=2)
    beams: tuple[int, ...] = option((1,), least=1)
    tenants: tuple[int, ...] = option((1,), least=1)
    rank: tuple[int, ...] = option((32,), least=1)
    top_k: tuple[int, ...] = option((3,), least=1)
    path: str = ""
    prefill_rows: int = option(1, least=1)
    chunk: int = option(CHUNK, least=1)


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Measure all variants and yield a report of each."""
    varied = ("method", "batch", "beams", "tenants", "rank", "top_k", "quantize")
    grid = itertools.product(*(getattr(settings, name) for name in varied))
    variants = list(dict.fromkeys(_without_what_has_no_effect(Variant(*values)) for values in grid))
    loaded = {
        kept: load_model(settings.model, settings.dtype, decode=True, quantize=kept)
        for kept in settings.quantize
    }
    config = next(iter(loaded.values()))[1]
    if settings.prompt + settings.new > config.max_positions:
        raise UserError(
            f"--prompt {settings.prompt} and --new {settings.new}: "
            f"expected at most {config.max_positions} together"
        )
    with ExitStack() as stack:
        cases = [
            make_peer(stack, config, variant, settings)
            if variant.method in PEERS
            else make_case(*loaded[variant.quantize], variant, settings)
            for variant in variants
        ]
        bandwidth = measure_in_turns(cases, settings)
    for case in cases:
        yield report(case, config, settings, bandwidth)


def measure_in_turns(cases: list[Case], settings: Settings) -> float:
    """Run the cases in turns, as the settings say, and return the memory's bandwidth meanwhile."""
    for case in cases:
        begin = time.perf_counter()
        case.run(settings.new)
        case.run(1)
        case.compile_s = time.perf_counter() - begin

    def take(case: Case) -> None:
        case.whole.append(_timed(case.run, settings.new))
        case.first.append(_timed(case.run, 1))

    return in_turns(cases, settings.repeats, take, machine.measure_bandwidth)


def _without_what_has_no_effect(variant: Variant) -> Variant:
    """A variant with 0 for settings that its method does not have."""
    if variant.method in PEERS:
        variant = dataclasses.replace(variant, quantize="none")
    if variant.method in ("none", "hf"):
        return dataclasses.replace(variant, tenants=0, rank=0, top_k=0)
    if variant.method not in ("milora", "midora"):
        return dataclasses.replace(variant, top_k=0)
    return variant


def make_peer(stack: ExitStack, config: ModelConfig, variant: Variant, settings: Settings) -> Case:
    """Start a peer, which lives as long as ``stack``."""
    sizes = {"batch": variant.batch, "prompt": settings.prompt, "beams": variant.beams}
    peer = stack.enter_context(
        started(
            settings.peer_python,
            peer_directory(stack, settings.model, config, settings.dtype),
            variant.method,
            "decode",
            {"dtype": settings.dtype, **sizes, "tenants": variant.tenants, "rank": variant.rank},
        )
    )
    return Case(variant, peer.run, None, None, peer=peer.versions)


def make_case(base: Base, config: ModelConfig, variant: Variant, settings: Settings) -> Case:
    """Build the adapters of a variant and the function that runs them."""
    tenants = make_tenants(base, config, variant, settings.path)
    rng = np.random.default_rng(0)
    prompts = rng.integers(4, config.vocab_size, (variant.batch, settings.prompt)).tolist()
    slots = [i % max(variant.tenants, 1) for i in range(variant.batch)]
    if variant.beams > 1:
        if variant.tenants > 1:
            raise UserError("--beams above 1 is measured with one tenant")

        def run_beams(new: int) -> None:
            search = GenerationSettings(max_new_tokens=new, num_beams=variant.beams, ignore_eos=True)
            beam_search(base, config, tenants, prompts, search)

        return Case(variant, run_beams, base, tenants)
    engine = Engine(
        base,
        config,
        tenants,
        batch_slots=variant.batch,
        cache_length=settings.prompt + settings.new,
        chunk=settings.chunk,
        penalties=False,
        prefill_rows=min(settings.prefill_rows, variant.batch),
    )

    def run(new: int) -> None:
        each = GenerationSettings(max_new_tokens=new, ignore_eos=True)
        for prompt, slot in zip(prompts, slots, strict=True):
            engine.submit(prompt, each, slot)
        engine.run()

    return Case(variant, run, base, tenants)


def make_tenants(base: Base, config: ModelConfig, variant: Variant, path: str) -> AdapterStack | None:
    """The adapters of a variant."""
    if variant.method == "none":
        return None
    method = variant.method.removesuffix(RECOMPUTED)
    routed = method in ("milora", "midora")
    section = AdapterSection(method=method, rank=variant.rank, top_k=variant.top_k if routed else None)
    first = random_adapter(base, config, section, 0)
    if variant.method.endswith(RECOMPUTED):
        require(variant.tenants == 1, "--tenants", variant.tenants, f"1 with {variant.method}")
        params = unstack_layers(jax.tree.map(lambda leaf: leaf.astype(base.dtype), first.params))
        return AdapterStack(params=params, method=Recomputed(first.method), shape=first.shape, path="one")
    if variant.tenants == 1:
        return AdapterStack.single(adapter_decode_layout(first, base))
    bank = Bank(base, config, first, variant.tenants, path=path)
    for slot in range(variant.tenants):
        bank.load(str(slot), random_adapter(base, config, section, 7 * slot), slot)
    return bank.adapters


def _timed(run: Callable[[int], None], new: int) -> float:
    begin = time.perf_counter()
    run(new)
    return time.perf_counter() - begin


def report(case: Case, config: ModelConfig, settings: Settings, bandwidth: float) -> dict[str, Any]:
    """The figures of one variant as JSON."""
    variant = case.variant
    whole, first = statistics.median(case.whole), statistics.median(case.first)
    steps = settings.new - 1
    decoding = statistics.median(a - b for a, b in zip(case.whole, case.first, strict=True))
    return {
        "what": "decode",
        "model": settings.model,
        **dataclasses.asdict(variant),
        "dtype": settings.dtype,
        "prompt": settings.prompt,
        "new": settings.new,
        "path": None if case.tenants is None else case.tenants.path,
        "tok_s": variant.batch * settings.new / whole,
        "decode_tok_s": variant.batch * steps / decoding,
        "ms_per_step": 1e3 * decoding / steps,
        "prefill_ms": 1e3 * first,
        "compile_s": case.compile_s,
        **read(case, config, settings, bandwidth * decoding / steps),
        "bandwidth_gb_s": bandwidth / 1e9,
        "seconds": sorted(case.whole),
        **machine.describe(case.peer),
    }


def read(
    case: Case, config: ModelConfig, settings: Settings, readable: float
) -> dict[str, float | int | None]:
    """The bytes that a step must read, and their share of ``readable`` ones; unknown for a peer."""
    names = ("weight_bytes", "adapter_bytes", "cache_bytes", "roofline_share")
    if case.base is None:
        return dict.fromkeys(names)
    variant = case.variant
    # Beams of a prompt share its keys and values, which are read once.
    context = variant.batch * settings.prompt + variant.batch * variant.beams * settings.new / 2
    a_position = 2 * config.num_layers * config.num_kv_heads * config.head_dim * case.base.dtype.itemsize
    rows = variant.batch * variant.beams
    weights = streamed_bytes(case.base, config, rows)
    sizes = (weights, adapter_bytes(case.tenants, variant), int(context * a_position))
    return dict(zip(names, (*sizes, sum(sizes) / readable), strict=True))


def adapter_bytes(tenants: AdapterStack | None, variant: Variant) -> int:
    """Bytes of the adapters that a step reads; the router is not among them.

    On the kernels' path only the chosen experts count, averaged over random routes.
    """
    if tenants is None:
        return 0
    params = [getattr(layer, "experts", layer) for layer in tenants.params]
    size = bytes_of(params)
    if tenants.path in KERNELS:
        chosen = variant.top_k / len(EXPERTS) if variant.top_k else 1.0
        return int(size / variant.tenants * variant.batch * chosen)
    if tenants.path == "gathered":
        return size // variant.tenants * variant.batch
    return size
