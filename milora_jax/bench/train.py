"""``python -m milora_jax.bench train``: the speed of training.

Several values of ``--method``, ``--objective``, ``--batch``, ``--rank``, ``--remat`` and ``--quantize``,
separated by commas, are measured side by side: every round takes one step of each in turn. One JSON object
per line and variant. A step is an update of Omega. MiLoRA's bi-level update of Theta (Appendix A of the
paper), every ``train.coefficient_every`` steps, costs as much again and is not in it. The peer of
``--objective dpo`` is TRL's trainer with PEFT's LoRA.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from milora_jax.adapters.registry import METHODS, build_method
from milora_jax.base.attention import attention, device_layout
from milora_jax.base.modules import Base
from milora_jax.bench import machine
from milora_jax.bench.models import load_model, peer_directory, random_adapter
from milora_jax.bench.peer import Peer, started
from milora_jax.bench.rounds import ModelSettings, in_turns, option
from milora_jax.config import OBJECTIVES, REMAT, AdapterSection, TrainSection
from milora_jax.data.batches import collate
from milora_jax.data.packing import Rows
from milora_jax.data.preferences import ANSWERS
from milora_jax.data.tokens import Example
from milora_jax.errors import UserError, one_of, require
from milora_jax.model_config import ModelConfig
from milora_jax.training.step import init_state, make_steps

PEERS = ("peft-lora", "peft-dora")

# fmt: off
GSM8K_LENGTHS = (
    (101, 44), (96, 62), (98, 71), (104, 74), (96, 89), (114, 76), (95, 101), (90, 111),
    (148, 56), (97, 113), (88, 126), (110, 108), (164, 57), (102, 124), (98, 132), (157, 76),
    (151, 86), (133, 108), (128, 117), (159, 89), (141, 111), (103, 153), (143, 116), (147, 116),
    (144, 123), (130, 141), (121, 154), (133, 146), (112, 171), (128, 159), (169, 121), (171, 123),
    (123, 176), (174, 129), (155, 153), (136, 177), (155, 163), (183, 139), (140, 187), (166, 166),
    (150, 187), (200, 142), (141, 208), (165, 189), (161, 199), (197, 168), (159, 212), (168, 209),
    (186, 196), (159, 230), (162, 235), (179, 226), (191, 222), (227, 195), (246, 185), (146, 297),
    (198, 257), (157, 310), (218, 263), (197, 301), (247, 272), (202, 342), (233, 345), (386, 380),
)
# fmt: on
"""Tokens of prompt and response of 64 of GSM8K's training rows, evenly spaced when all rows of at most 768
tokens are sorted by length, under the tokenizer of this package's own model. Their mean is 319."""


@dataclass(frozen=True)
class Variant:
    """One combination of settings that is measured.

    Attributes:
      rows: "full", every row one record; "pairs", two answers behind a prompt each, as long together;
        "padded", one record of GSM8K's lengths in every row; "packed", several.
    """

    method: str
    batch: int
    rank: int
    remat: str
    quantize: str
    rows: str
    objective: str = TrainSection().objective


@dataclass
class Case:
    """A variant ready to run.

    Attributes:
      step: takes a training step and waits for it.
      useful: tokens of a step that are not padding.
      peak: most memory used so far, in bytes.
      step_bytes: memory of a step by the compiler's analysis; None for a peer.
    """

    variant: Variant
    step: Callable[[], None]
    useful: int
    peak: Callable[[], int]
    compile_s: float
    step_bytes: int | None = None
    peer: dict[str, str] | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)


@dataclass(frozen=True)
class Settings(ModelSettings):
    """The settings of ``bench train``.

    Attributes:
      method: method that is trained.
      objective: see train.objective. A step of a preference objective reads as many tokens as one of sft.
      batch: rows of a step.
      seq: tokens of a row.
      rank: rank of methods made of low-rank pairs.
      remat: what the backward pass computes again, see train.remat.
      packed: measure records of GSM8K's lengths, padded and packed, instead of full rows.
      loss_chunk: see train.loss_chunk.
    """

    method: tuple[str, ...] = option(("milora",), choices=(*METHODS, *PEERS))
    objective: tuple[str, ...] = option((TrainSection().objective,), choices=OBJECTIVES)
    batch: tuple[int, ...] = option((8,), least=1)
    seq: int = option(256, least=2)
    rank: tuple[int, ...] = option((32,), least=1)
    remat: tuple[str, ...] = option((TrainSection().remat,), choices=REMAT)
    packed: bool = False
    loss_chunk: int = option(TrainSection().loss_chunk, least=1)


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Measure all variants and yield a report of each."""
    every = [
        Variant(method, batch, rank, remat, quantize, rows, objective)
        for method, objective, batch, rank, remat, quantize in itertools.product(
            *(settings.method, settings.objective, settings.batch, settings.rank),
            *(settings.remat, settings.quantize),
        )
        for rows in rows_of(objective, settings)
    ]
    variants = list(dict.fromkeys(map(_without_what_has_no_effect, every)))
    loaded = {
        kept: load_model(settings.model, settings.dtype, decode=False, quantize=kept)
        for kept in settings.quantize
    }
    config = next(iter(loaded.values()))[1]
    require(settings.seq <= config.max_positions, "--seq", settings.seq, f"at most {config.max_positions}")
    with ExitStack() as stack:
        cases = [
            make_peer(stack, config, variant, settings)
            if variant.method in PEERS
            else make_case(loaded[variant.quantize][0], config, variant, settings)
            for variant in variants
        ]
        matmul = in_turns(cases, settings.repeats, take_step, lambda: machine.measure_matmul(settings.dtype))
        for case in cases:
            yield report(case, config, settings, matmul)


def rows_of(objective: str, settings: Settings) -> tuple[str, ...]:
    """What the rows of an objective are.

    Raises:
      UserError: rows that the objective does not have were asked for.
    """
    if TrainSection(objective=objective).prefers:
        require(not settings.packed, "--packed", True, f"off with {objective}")
        require(settings.seq >= 4, "--seq", settings.seq, f"at least 4 with {objective}")
        return ("pairs",)
    return ("padded", "packed") if settings.packed else ("full",)


def take_step(case: Case) -> None:
    """Take one step of a case and record its seconds."""
    begin = time.perf_counter()
    case.step()
    case.seconds.append(time.perf_counter() - begin)


def _without_what_has_no_effect(variant: Variant) -> Variant:
    """A variant with rank 0, no remat and a plain base where its method has no such setting."""
    ranked = variant.method in PEERS or hasattr(build_method(AdapterSection(method=variant.method)), "rank")
    if not ranked:
        variant = dataclasses.replace(variant, rank=0)
    if variant.method in PEERS:
        variant = dataclasses.replace(variant, remat="none", quantize="none")
    return variant


def make_peer(stack: ExitStack, config: ModelConfig, variant: Variant, settings: Settings) -> Case:
    """Start a peer, which lives as long as ``stack``."""
    require(not settings.packed, "--packed", True, f"off with {variant.method}")
    one_of(f"--objective with {variant.method}", variant.objective, ("sft", "dpo"))
    peer: Peer = stack.enter_context(
        started(
            settings.peer_python,
            peer_directory(stack, settings.model, config, settings.dtype),
            variant.method,
            "train",
            {
                **{"dtype": settings.dtype, "batch": variant.batch, "prompt": settings.seq},
                **{"rank": variant.rank, "objective": variant.objective},
            },
        )
    )
    begin = time.perf_counter()
    peer.run(1)
    warm = time.perf_counter() - begin
    useful = variant.batch * settings.seq
    return Case(variant, lambda: peer.run(1), useful, lambda: peer.peak, warm, peer=peer.versions)


def records(rows: str, count: int, seq: int, vocab_size: int) -> list[list[Example]]:
    """The records of ``count`` rows.

    Raises:
      UserError: no record of GSM8K's lengths fits a row.
    """
    rng = np.random.default_rng(0)

    def record(prompt: int, response: int) -> Example:
        return Example(rng.integers(4, vocab_size, prompt + response).astype(np.int32), prompt)

    def pair(total: int) -> list[Example]:
        chosen = record(total // 4, total // 2 - total // 4)
        answer = rng.integers(4, vocab_size, total - total // 2 - total // 4).astype(np.int32)
        prompt = chosen.tokens[: total // 4]
        return [chosen, Example(np.concatenate([prompt, answer]), len(prompt), label=False)]

    if rows == "full":
        return [[record(seq // 2, seq - seq // 2)] for _ in range(count)]
    if rows == "pairs":
        return [pair(seq) for _ in range(count)]
    fitting = [lengths for lengths in GSM8K_LENGTHS if sum(lengths) <= seq]
    if not fitting:
        raise UserError(f"--seq {seq}: expected at least {min(map(sum, GSM8K_LENGTHS))} with --packed")
    if rows == "padded":
        return [[record(*fitting[i])] for i in rng.integers(0, len(fitting), count)]
    # As many records as a data set has, so that rows are filled as they would be.
    many = [record(*fitting[i]) for i in rng.integers(0, len(fitting), 64 * count)]
    packed = Rows(many, seq)
    return [packed[i] for i in rng.permutation(len(packed))[:count]]


def make_case(base: Base, config: ModelConfig, variant: Variant, settings: Settings) -> Case:
    """Compile the step of a variant."""
    section = AdapterSection(method=variant.method, rank=variant.rank or None)
    adapter = random_adapter(base, config, section, 0)
    train = TrainSection(
        objective=variant.objective,
        batch_size=variant.batch,
        remat=variant.remat,
        loss_chunk=settings.loss_chunk,
    )
    rows = records(variant.rows, variant.batch, settings.seq, config.vocab_size)
    answers = ANSWERS if train.prefers else 1
    prompts = max(map(len, rows)) // answers
    batch = jax.device_put(collate(rows, settings.seq, variant.batch, prompts, answers))
    state = init_state(adapter, jax.random.key(0), train, 1000)
    # A donated state must not share a constant with the base, so each gets its own.
    held = [jax.tree.map(lambda leaf: leaf.copy(), state)]
    attend = functools.partial(attention, layout=device_layout(base.devices))
    steps = make_steps(config, train, 1000, attend=attend)
    begin = time.perf_counter()
    program = steps.train.lower(held[0], base, batch).compile()
    compile_s = time.perf_counter() - begin

    def step() -> None:
        # Not ``program``: on a CPU it refuses numbers of four bits, for which it expects another layout.
        held[0], metrics = steps.train(held[0], base, batch)
        jax.block_until_ready((held[0].adapter, metrics))

    step()
    memory = program.memory_analysis()
    size = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    useful = sum(len(example.tokens) for row in rows for example in row)
    return Case(variant, step, useful, machine.peak_memory, compile_s, step_bytes=size)


def report(case: Case, config: ModelConfig, settings: Settings, matmul: float) -> dict[str, Any]:
    """The figures of one variant as JSON."""
    seconds = statistics.median(case.seconds)
    tokens = case.variant.batch * settings.seq
    # Forward 2N and backward 2N: a frozen matrix has no gradient of its own. Attention is not counted, nor is
    # the forward pass of a preference objective's reference model, 2N more.
    flops = 4 * config.matrix_parameters * tokens / seconds
    return {
        "what": "train",
        "model": settings.model,
        **dataclasses.asdict(case.variant),
        "seq": settings.seq,
        "dtype": settings.dtype,
        "tok_s": tokens / seconds,
        "useful_tok_s": case.useful / seconds,
        "useful_share": case.useful / tokens,
        "ms_per_step": 1e3 * seconds,
        "compile_s": case.compile_s,
        "peak_memory_bytes": case.peak(),
        "step_bytes": case.step_bytes,
        "model_flops_s": flops,
        "matmul_flops_s": matmul,
        "matmul_share": flops / matmul,
        "seconds": sorted(case.seconds),
        **machine.describe(case.peer),
    }
