"""Compile a run's programs ahead of time for TPUs or GPUs that are not attached.

The compiler is the real one, in libtpu or in JAX's CUDA plugin: it partitions and schedules the program.
For a TPU it refuses a program that does not fit the chip; for a GPU it does not, so numbers are compared
here. Nothing runs. Memory per chip is the compiler's figure. Floating-point operations are our own count,
because the compiler counts a scan over layers as one layer. Collectives are instructions, not executions.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax

from milora_jax.config import Config, MeshSection
from milora_jax.errors import UserError, require
from milora_jax.model_config import ModelConfig
from milora_jax.parallel.mesh import check_divides, eval_mesh, make_mesh
from milora_jax.scaling.chips import CHIPS, GIB, Chip
from milora_jax.scaling.gpus import GPUS, PREALLOCATED, Gpu, layout_of
from milora_jax.scaling.programs import STEPS, decode_program, prefill_program, train_program

WHAT = ("train", "prefill", "decode")

QUICK = {"exec_time_optimization_effort": -1.0}
"""Compile ten times as fast. On the 7B step the peak is 0.8 % below that of the default effort."""

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Without these, libtpu searches for a TPU machine and logs it at length. Their values do not matter."""


@dataclass(frozen=True)
class Memory:
    """Bytes per chip.

    Attributes:
      arguments: base, adapter, optimiser states and batch.
      temporaries: memory beside arguments and results.
      donated: results that reuse the memory of arguments.
      peak: largest sum at any time.
    """

    arguments: int
    temporaries: int
    donated: int
    peak: int


@dataclass(frozen=True)
class Compiled:
    """The result of compiling one program for one mesh.

    Attributes:
      memory: None where the compiler refused.
      problem: why the program does not fit; empty where it does.
      flops: floating-point operations of all chips for one step: 2N per token forward and 2N backward for a
        frozen base of N parameters in matrices, as useful work; recomputation and attention are not in it.
    """

    what: str
    mesh: MeshSection
    devices: int
    remat: str
    batch: int
    memory: Memory | None
    problem: str
    flops: float
    collectives: dict[str, int]
    compile_s: float

    @property
    def fits(self) -> bool:
        """Whether the program fits the chips' memory."""
        return not self.problem


class Topology:
    """Chips that need not be attached.

    Args:
      name: name of a TPU topology in libtpu, such as ``v5e:4x4``; or a GPU and a number, such as ``h200:8``.

    Raises:
      UserError: the compiler is missing, is in use by another process, or does not know the topology.
    """

    def __init__(self, name: str) -> None:
        self.name, self.chip = name, chip_of(name)
        if isinstance(self.chip, Gpu):
            card, layout = layout_of(name)
            asked = {"platform": "cuda", "topology_name": "", "topology": layout}
            asked["target_config"] = self.chip.described(card)
            hint = "the compiler is installed by pip install 'milora-jax[cuda13]'"
        else:
            for variable, value in QUIET.items():
                os.environ.setdefault(variable, value)
            asked = {"platform": "tpu", "topology_name": name, **_host_of(name)}
            hint = "libtpu is installed by pip install 'milora-jax[tpu]'; one process at a time may hold it"
        from jax.experimental import topologies

        try:
            self.devices = topologies.get_topology_desc(**asked).devices
        except RuntimeError as error:  # NotImplementedError is one
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"--topology {name!r}: {line} ({hint})") from None

    def compile(self, config: Config, model: ModelConfig, what: str, prompts: int = 1) -> Compiled:
        """Compile the program of a config on its mesh.

        Raises:
          UserError: the mesh does not divide the chips, the batch or the model.
        """
        require(what in WHAT, "--what", what, f"one of {', '.join(WHAT)}")
        mesh = make_mesh(config.mesh, self.devices)
        if what != "train":
            mesh = eval_mesh(mesh, config)
        section, train = ("train", config.train) if what == "train" else ("eval", config.eval)
        parts = {"train.batch_size": config.train.accumulate}
        check_divides(mesh, model, {f"{section}.batch_size": train.batch_size}, parts, heads=what == "train")
        begin = time.monotonic()
        if what == "train":
            lowered = train_program(config, model, mesh, prompts)
        else:
            lowered = (prefill_program if what == "prefill" else decode_program)(config, model, mesh)
        sizes = dict(mesh.shape)
        found = {
            "what": what,
            "mesh": MeshSection(**sizes),
            "devices": mesh.size,
            "remat": config.train.remat if what == "train" else "",
            "batch": train.batch_size,
            "flops": step_flops(config, model, what),
        }
        try:
            program = lowered.compile(compiler_options={} if isinstance(self.chip, Gpu) else QUICK)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            line = str(error).splitlines()[0]
            seconds = time.monotonic() - begin
            return Compiled(**found, memory=None, problem=line, collectives={}, compile_s=seconds)
        memory = _memory(program.memory_analysis())
        return Compiled(
            **found,
            memory=memory,
            problem=_too_much(memory, self.chip),
            collectives=count_collectives(program.as_text()),
            compile_s=time.monotonic() - begin,
        )


def _host_of(topology: str) -> dict[str, Any]:
    """Chips of a host: the usual ones of the kind; a single chip is a host of its own."""
    sizes = set(topology.partition(":")[2].split("x"))
    return {"chips_per_host_bounds": (1, 1, 1)} if sizes == {"1"} else {}


def chip_of(topology: str) -> Chip:
    """The chip of a topology's name, such as ``v5e:2x4``.

    Raises:
      UserError: the chip is unknown.
    """
    kind, separator, layout = topology.partition(":")
    known = {**CHIPS, **GPUS}
    expected = f"CHIP:LAYOUT such as v5e:2x4 or h200:8, with CHIP of {', '.join(known)}"
    require(kind in known and bool(separator) and bool(layout), "--topology", topology, expected)
    return known[kind]


def _memory(analysis: Any) -> Memory:
    arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    donated = analysis.alias_size_in_bytes
    # The compiler gives no peak for a GPU's program: the sum of everything is an upper bound.
    most = arguments + temporaries + analysis.output_size_in_bytes - donated
    peak = getattr(analysis, "peak_memory_in_bytes", 0) or most
    return Memory(arguments=arguments, temporaries=temporaries, donated=donated, peak=peak)


def _too_much(memory: Memory, chip: Chip) -> str:
    """Why a GPU's memory is too small; the compiler for TPUs checks that itself."""
    if not isinstance(chip, Gpu) or memory.peak <= PREALLOCATED * chip.memory:
        return ""
    return (
        f"{memory.peak / GIB:.2f} GiB of {chip.memory / GIB:.0f}, of which JAX takes "
        f"{100 * PREALLOCATED:.0f} % (XLA_PYTHON_CLIENT_MEM_FRACTION)"
    )


def count_collectives(program: str) -> dict[str, int]:
    """Instructions of a compiled program by kind of collective; a start and its done are one.

    >>> count_collectives("%a = f32[2] all-gather-start(%x)\\n%b = f32[2] all-gather-done(%a)")
    {'all-gather': 1}
    """
    kinds = "|".join(COLLECTIVES)
    return dict(Counter(re.findall(rf"= .*? ({kinds})(?:-start)?\(", program)))


def step_flops(config: Config, model: ModelConfig, what: str) -> float:
    """Useful floating-point operations of one program; see :class:`Compiled`."""
    per_token = 4.0 if what == "train" else 2.0
    if what == "decode":
        return per_token * model.matrix_parameters * config.eval.batch_size * STEPS
    rows = config.train.batch_size if what == "train" else config.eval.batch_size
    return per_token * model.matrix_parameters * rows * config.data.max_length


def describe(found: Compiled, chip: Chip) -> list[str]:
    """A few lines for people."""
    remat = f", remat {found.remat}" if found.remat else ""
    lines = [f"{found.what} on {found.devices} devices, mesh {found.mesh}, batch {found.batch}{remat}"]
    if found.memory is None:
        return [*lines, f"  does not fit: {found.problem}"]
    if found.problem:
        lines.append(f"  does not fit: {found.problem}")
    memory = found.memory
    counted = ", ".join(f"{n} {kind}" for kind, n in sorted(found.collectives.items())) or "no collectives"
    donated = f"{memory.donated / GIB:.3f} of them donated"
    lines += [
        f"  per chip  {memory.peak / GIB:7.3f} GiB at most, of {chip.memory / GIB:.0f}",
        f"            {memory.arguments / GIB:7.3f} GiB arguments ({donated})",
        f"            {memory.temporaries / GIB:7.3f} GiB temporaries",
        f"  work      {found.flops / 1e12:7.1f} TFLOP on all chips, "
        f"{found.flops / found.devices / chip.flops:.3f} s at their peak",
        f"  program   {counted} (instructions); compiled in {found.compile_s:.0f} s",
    ]
    return lines
