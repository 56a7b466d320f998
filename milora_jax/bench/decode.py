"""``python -m milora_jax.bench decode``: how fast prompts are continued.

Several values of ``--method``, ``--batch``, ``--beams``, ``--tenants``, ``--rank``, ``--top-k`` and
``--quantize``, separated by commas, are measured side by side: every repetition runs each of them once, in
turn, so that what disturbs the machine disturbs all alike. One JSON object per line and variant.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable
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
from milora_jax.bench.rounds import add_common, in_turns, names, numbers, require_least, require_names
from milora_jax.cli import Parser
from milora_jax.config import QUANTIZE, AdapterSection
from milora_jax.errors import UserError, require
from milora_jax.generation.adapter_stack import AdapterStack
from milora_jax.generation.bank import Bank
from milora_jax.generation.beam import beam_search
from milora_jax.generation.engine import CHUNK, Engine
from milora_jax.generation.settings import GenerationSettings
from milora_jax.model_config import ModelConfig
from milora_jax.types import EXPERTS, unstack_layers

METHODS = ("none", "lora", "dora", "dora-recomputed", "moelora", "milora", "midora", *PEERS)


@dataclass(frozen=True)
class Variant:
    """One thing that is measured."""

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
      run: continues the prompts by so many tokens.
      base: None of a peer.
      tenants: what acts on the base.
      peer: versions of the peer that runs it, instead of us.
    """

    variant: Variant
    run: Callable[[int], None]
    base: Base | None
    tenants: AdapterStack | None
    peer: dict[str, str] | None = None
    compile_s: float = 0.0
    whole: list[float] = dataclasses.field(default_factory=list)
    first: list[float] = dataclasses.field(default_factory=list)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="python -m milora_jax.bench decode", description=__doc__)

    add_common(parser, PEERS)
    parser.add_argument("--method", type=names, default=["milora"], help=f"of {', '.join(METHODS)}")
    parser.add_argument("--batch", type=numbers, default=[1], help="prompts")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of a continuation")
    parser.add_argument("--beams", type=numbers, default=[1], help="width of the search; 1 is greedy")
    parser.add_argument("--tenants", type=numbers, default=[1], help="adapters in the batch")
    parser.add_argument("--rank", type=numbers, default=[32], help="of every module's matrices together")
    parser.add_argument("--top-k", type=numbers, default=[3], help="experts that MiLoRA and MiDoRA choose")
    parser.add_argument("--path", default="", help="how rows find their adapters; empty: what suits")
    parser.add_argument("--prefill-rows", type=int, default=1, help="prompts prefilled together")
    parser.add_argument("--chunk", type=int, default=CHUNK, help="steps per compiled chunk")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Measure, and print one JSON object per variant."""
    asked = parse(arguments)
    sizes = dict.fromkeys(("batch", "beams", "tenants", "rank", "top_k"), 1)
    require_least(asked, {"repeats": 1, "prompt": 1, "new": 2, "chunk": 1, "prefill_rows": 1, **sizes})
    require_names("--method", asked.method, METHODS)
    require_names("--quantize", asked.quantize, QUANTIZE)
    grid = itertools.product(*(getattr(asked, name) for name in ("method", *sizes, "quantize")))
    variants = list(dict.fromkeys(_without_what_has_no_effect(Variant(*values)) for values in grid))
    loaded = {
        kept: load_model(asked.model, asked.dtype, decode=True, quantize=kept) for kept in asked.quantize
    }
    config = next(iter(loaded.values()))[1]
    if asked.prompt + asked.new > config.max_positions:
        raise UserError(
            f"--prompt {asked.prompt} and --new {asked.new}: expected at most {config.max_positions} together"
        )
    with ExitStack() as stack:
        cases = [
            make_peer(stack, config, variant, asked)
            if variant.method in PEERS
            else make_case(*loaded[variant.quantize], variant, asked)
            for variant in variants
        ]
        bandwidth = measure(cases, asked)
    for case in cases:
        print(json.dumps(report(case, config, asked, bandwidth)), flush=True)


def measure(cases: list[Case], asked: argparse.Namespace) -> float:
    """Run every case in turn, as often as asked; the memory's bandwidth meanwhile."""
    for case in cases:
        begin = time.perf_counter()
        case.run(asked.new)
        case.run(1)
        case.compile_s = time.perf_counter() - begin

    def take(case: Case) -> None:
        case.whole.append(_timed(case.run, asked.new))
        case.first.append(_timed(case.run, 1))

    return in_turns(cases, asked.repeats, take, machine.measure_bandwidth)


def _without_what_has_no_effect(variant: Variant) -> Variant:
    """A variant with 0 for the settings its method does not have."""
    if variant.method in PEERS:
        variant = dataclasses.replace(variant, quantize="none")
    if variant.method in ("none", "hf"):
        return dataclasses.replace(variant, tenants=0, rank=0, top_k=0)
    if variant.method not in ("milora", "midora"):
        return dataclasses.replace(variant, top_k=0)
    return variant


def make_peer(stack: ExitStack, config: ModelConfig, variant: Variant, asked: argparse.Namespace) -> Case:
    """Start a peer, which lives as long as ``stack``."""
    sizes = {"batch": variant.batch, "prompt": asked.prompt, "beams": variant.beams}
    peer = stack.enter_context(
        started(
            asked.peer_python,
            peer_directory(stack, asked.model, config, asked.dtype),
            variant.method,
            "decode",
            {"dtype": asked.dtype, **sizes, "tenants": variant.tenants, "rank": variant.rank},
        )
    )
    return Case(variant, peer.run, None, None, peer=peer.versions)


def make_case(base: Base, config: ModelConfig, variant: Variant, asked: argparse.Namespace) -> Case:
    """Build the adapters and what runs them."""
    tenants = make_tenants(base, config, variant, asked.path)
    rng = np.random.default_rng(0)
    prompts = rng.integers(4, config.vocab_size, (variant.batch, asked.prompt)).tolist()
    slots = [i % max(variant.tenants, 1) for i in range(variant.batch)]
    if variant.beams > 1:
        if variant.tenants > 1:
            raise UserError("--beams above 1 is measured with one tenant")

        def run_beams(new: int) -> None:
            settings = GenerationSettings(max_new_tokens=new, num_beams=variant.beams, ignore_eos=True)
            beam_search(base, config, tenants, prompts, settings)

        return Case(variant, run_beams, base, tenants)
    engine = Engine(
        base,
        config,
        tenants,
        batch_slots=variant.batch,
        cache_length=asked.prompt + asked.new,
        chunk=asked.chunk,
        penalties=False,
        prefill_rows=min(asked.prefill_rows, variant.batch),
    )

    def run(new: int) -> None:
        settings = GenerationSettings(max_new_tokens=new, ignore_eos=True)
        for prompt, slot in zip(prompts, slots, strict=True):
            engine.submit(prompt, settings, slot)
        engine.run()

    return Case(variant, run, base, tenants)


def make_tenants(base: Base, config: ModelConfig, variant: Variant, path: str) -> AdapterStack | None:
    """The adapters of a variant."""
    if variant.method == "none":
        return None
    method = variant.method.removesuffix(RECOMPUTED)
    routed = method in ("milora", "midora")
    settings = AdapterSection(method=method, rank=variant.rank, top_k=variant.top_k if routed else None)
    first = random_adapter(base, config, settings, 0)
    if variant.method.endswith(RECOMPUTED):
        require(variant.tenants == 1, "--tenants", variant.tenants, f"1 with {variant.method}")
        params = unstack_layers(jax.tree.map(lambda leaf: leaf.astype(base.dtype), first.params))
        return AdapterStack(params=params, method=Recomputed(first.method), shape=first.shape, path="one")
    if variant.tenants == 1:
        return AdapterStack.single(adapter_decode_layout(first, base))
    bank = Bank(base, config, first, variant.tenants, path=path)
    for slot in range(variant.tenants):
        bank.load(str(slot), random_adapter(base, config, settings, 7 * slot), slot)
    return bank.adapters


def _timed(run: Callable[[int], None], new: int) -> float:
    begin = time.perf_counter()
    run(new)
    return time.perf_counter() - begin


def report(case: Case, config: ModelConfig, asked: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    """The figures of one variant."""
    variant = case.variant
    whole, first = statistics.median(case.whole), statistics.median(case.first)
    steps = asked.new - 1
    decoding = statistics.median(a - b for a, b in zip(case.whole, case.first, strict=True))
    return {
        "what": "decode",
        "model": asked.model,
        **dataclasses.asdict(variant),
        "dtype": asked.dtype,
        "prompt": asked.prompt,
        "new": asked.new,
        "path": None if case.tenants is None else case.tenants.path,
        "tok_s": variant.batch * asked.new / whole,
        "decode_tok_s": variant.batch * steps / decoding,
        "ms_per_step": 1e3 * decoding / steps,
        "prefill_ms": 1e3 * first,
        "compile_s": case.compile_s,
        **read(case, config, asked, bandwidth * decoding / steps),
        "bandwidth_gb_s": bandwidth / 1e9,
        "seconds": sorted(case.whole),
        **machine.describe(case.peer),
    }


def read(
    case: Case, config: ModelConfig, asked: argparse.Namespace, readable: float
) -> dict[str, float | int | None]:
    """The bytes that a step must read, and their share of the ``readable`` ones; unknown of a peer."""
    names = ("weight_bytes", "adapter_bytes", "cache_bytes", "roofline_share")
    if case.base is None:
        return dict.fromkeys(names)
    variant = case.variant
    # Under beams a prompt's keys and values are read once for all of its beams.
    context = variant.batch * asked.prompt + variant.batch * variant.beams * asked.new / 2
    a_position = 2 * config.num_layers * config.num_kv_heads * config.head_dim * case.base.dtype.itemsize
    sizes = (streamed_bytes(case.base), adapter_bytes(case.tenants, variant), int(context * a_position))
    return dict(zip(names, (*sizes, sum(sizes) / readable), strict=True))


def adapter_bytes(tenants: AdapterStack | None, variant: Variant) -> int:
    """Bytes of adapters that a step reads: the router is not among them.

    On the kernels' path only the chosen experts count, in the mean over random routes.
    """
    if tenants is None:
        return 0
    params = [getattr(layer, "experts", layer) for layer in tenants.params]
    size = bytes_of(params)
    if tenants.path in ("tpu", "gpu"):
        chosen = variant.top_k / len(EXPERTS) if variant.top_k else 1.0
        return int(size / variant.tenants * variant.batch * chosen)
    if tenants.path == "gathered":
        return size // variant.tenants * variant.batch
    return size
