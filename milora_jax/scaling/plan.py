"""Search for the mesh and the recomputation that fit, and rank them by arithmetic."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from milora_jax.base.quantized import bits_of
from milora_jax.base.specs import LeafSpec, base_specs
from milora_jax.config import REMAT, Config, MeshSection
from milora_jax.errors import UserError
from milora_jax.model_config import ModelConfig
from milora_jax.scaling.aot import Compiled, Topology
from milora_jax.scaling.chips import GIB, Chip

Log = Callable[[str], None]

EXECUTED = {"none": 4.0, "products": 4.0, "full": 6.0}
"""Floating-point operations that a step executes per parameter and token, recomputation included."""

LARGEST_TENSOR = 8
"""Most chips that heads are split over; more pays off in decoding only."""


@dataclass(frozen=True)
class Estimate:
    """Lower bounds of the seconds of one step, by arithmetic.

    Attributes:
      compute: executed operations over the chips' peak.
      links: bytes that a chip must receive over the bandwidth of its links.
    """

    compute: float
    links: float

    @property
    def seconds(self) -> float:
        """The time with perfect overlap: the larger of the two."""
        return max(self.compute, self.links)


def estimate(config: Config, model: ModelConfig, chip: Chip, devices: int) -> Estimate:
    """Estimate one training step on a mesh whose sizes are all given.

    Fully sharded matrices are gathered once forward and once backward, and once more where layers are
    computed again; quantised ones are gathered as codes. A tensor-parallel layer sums two activations forward
    and two backward, for which a ring moves twice their bytes. Where experts are divided, a layer gathers its
    input and the adapter's two terms, and scatters its output and the hidden states. The adapter's gradient
    is not counted.
    """
    mesh, train = config.mesh, config.train
    tokens = train.batch_size * config.data.max_length
    compute = EXECUTED[train.remat] * model.matrix_parameters * tokens / (devices * chip.flops)
    width = jnp.dtype(config.model.dtype).itemsize
    passes = 3 if train.remat == "full" else 2
    held = base_bytes(config, model, mesh.expert)
    gathered = held / mesh.tensor * (mesh.fsdp - 1) / mesh.fsdp * passes
    rows = mesh.data * mesh.fsdp * mesh.expert
    activation = tokens / rows * model.hidden_size * width
    summed = 2 * passes * model.num_layers * 2 * activation * (mesh.tensor - 1) / mesh.tensor
    widths = 2 + 3 * model.intermediate_size / model.hidden_size / mesh.tensor
    exchanged = passes * model.num_layers * widths * activation * (mesh.expert - 1)
    return Estimate(compute, (gathered + summed + exchanged) / chip.link)


def base_bytes(config: Config, model: ModelConfig, expert: int = 1) -> float:
    """Bytes of the base in the dtype and quantisation of the config.

    Args:
      expert: parts into which the experts are divided, one of which counts.
    """
    specs: list[LeafSpec] = jax.tree.leaves(base_specs(model, quantize=config.model.quantize))

    def size(spec: LeafSpec) -> float:
        parts = 1 if spec.parts[0].expert is None else expert
        return math.prod(spec.shape) * bits_of(spec.dtype(config.model.dtype)) / 8 / parts

    return sum(map(size, specs))


def with_mesh(config: Config, mesh: MeshSection, remat: str, batch: int) -> Config:
    """The same run on another mesh."""
    train = dataclasses.replace(config.train, remat=remat, batch_size=batch)
    return dataclasses.replace(config, mesh=mesh, train=train)


def meshes(devices: int, config: Config, model: ModelConfig) -> list[MeshSection]:
    """Meshes worth compiling: tensor sizes that divide the heads, and the rest fully sharded, or, where there
    are too few rows for that, with fewer shards; for a base with experts also these divided as far as they
    can be."""
    found = []
    tensor = 1
    while tensor <= min(LARGEST_TENSOR, devices):
        rows = devices // tensor
        divides = devices % tensor == 0 and not model.num_kv_heads % tensor
        if divides and not config.train.batch_size % (rows * config.train.accumulate):
            found.append(MeshSection(data=1, fsdp=rows, tensor=tensor))
            if rows % 2 == 0 and rows > 2:
                found.append(MeshSection(data=2, fsdp=rows // 2, tensor=tensor))
            expert = math.gcd(rows, model.num_experts) if model.num_experts else 1
            if expert > 1:
                found.append(MeshSection(data=1, fsdp=rows // expert, tensor=tensor, expert=expert))
        tensor *= 2
    if not found:
        raise UserError(
            f"no mesh of {devices} devices divides train.batch_size {config.train.batch_size} "
            f"and {model.num_kv_heads} key heads: give a larger batch"
        )
    return found


def search(
    topology: Topology, config: Config, model: ModelConfig, log: Log
) -> list[tuple[Estimate, Compiled]]:
    """Compile every mesh with every kind of recomputation, and return those that fit, best first."""
    devices, fitting = len(topology.devices), []
    for mesh in meshes(devices, config, model):
        for remat in REMAT:
            candidate = with_mesh(config, mesh, remat, config.train.batch_size)
            found = topology.compile(candidate, model, "train")
            seconds = estimate(candidate, model, topology.chip, devices)
            log(_line(seconds, found))
            if found.fits:
                fitting.append((seconds, found))
    return sorted(fitting, key=lambda pair: (pair[0].seconds, pair[1].memory.peak if pair[1].memory else 0))


def plan(topology: Topology, config: Config, model: ModelConfig, log: Log) -> list[tuple[Estimate, Compiled]]:
    """Search, log what fits, best first, and log how far the batch of the best can grow."""
    ranked = search(topology, config, model, log)
    log("")
    if not ranked:
        log("nothing fits: use more chips, a smaller batch or train.accumulate")
        return ranked
    log("what fits, best first (seconds are arithmetic, not measured):")
    for seconds, found in ranked:
        log(_line(seconds, found))
    best = ranked[0][1]
    batch, largest = best.batch * 2, best
    while batch <= 8 * best.batch:
        found = topology.compile(with_mesh(config, best.mesh, best.remat, batch), model, "train")
        if not found.fits:
            break
        largest, batch = found, batch * 2
    if largest.memory is not None:
        peak = f"{largest.memory.peak / GIB:.2f} GiB"
        log(f"the first one's batch, doubled while it fits: {largest.batch} rows, {peak}")
    return ranked


def _line(seconds: Estimate, found: Compiled) -> str:
    peak = "does not fit" if found.memory is None or found.problem else f"{found.memory.peak / GIB:6.2f} GiB"
    return (
        f"  {found.mesh!s:28} remat {found.remat:9} {peak:>12}   "
        f"compute {seconds.compute:6.3f} s, links {seconds.links:6.3f} s"
    )
