"""Check that training and decoding take the same route, on real rows, real weights and the real programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from milora_jax.adapters.protocol import Adapter, init_adapter
from milora_jax.adapters.registry import adapter_shape
from milora_jax.base.attention import device_layout
from milora_jax.base.hf import Progress, load_leaves
from milora_jax.base.modules import Base, decode_layout, frozen_kernels
from milora_jax.base.transformer import adapter_decode_layout, forward
from milora_jax.console import Console
from milora_jax.data.batches import collate, collate_prompts
from milora_jax.data.packing import Rows
from milora_jax.data.tokens import Example
from milora_jax.doctor.findings import FAIL, OK, WARN, Finding
from milora_jax.doctor.rows import sample
from milora_jax.doctor.subject import Subject
from milora_jax.errors import UserError
from milora_jax.generation.adapter_stack import AdapterStack
from milora_jax.generation.decode import admit, decode_chunk, prefill
from milora_jax.generation.decode_state import empty_state
from milora_jax.generation.sampling import Plan, make_sampler
from milora_jax.generation.settings import GenerationSettings
from milora_jax.parallel.processes import place, to_host
from milora_jax.parallel.rules import (
    attend_over,
    base_sharding,
    batch_sharding,
    mesh_layout,
    state_shardings,
    with_layout,
)
from milora_jax.shapes import Float
from milora_jax.storage.adapters import newest_step, read_adapter, require_its_base
from milora_jax.types import Batch, Route

ROWS = 8
"""Rows whose routes are compared; more where the number of devices requires it."""

STEPS = 4
"""Decode steps after which the route must be unchanged."""

EXACT, ROUNDED = 1e-5, 2e-2
"""Largest difference of two router probabilities: for float32 on a CPU, and where products are rounded to
fewer bits, which the two programs do in different places."""

MULTIPLE = 8
"""Rows are padded to a multiple of this many tokens."""


@dataclass(frozen=True)
class Routes:
    """The routes of N prompts.

    Attributes:
      probs: router softmax.
      weights: weights of the experts, 0 for those that were not chosen.
    """

    probs: Float[np.ndarray, "L N E"]
    weights: Float[np.ndarray, "L N E"]

    @classmethod
    def of(cls, route: Route) -> Routes:
        """Collect the routes of the prompts that are present, row by row."""
        host = to_host(route)
        present = host.present[0]  # the same in every layer
        return cls(host.probs[:, present], host.weights[:, present])


def routing_findings(subject: Subject) -> Iterator[Finding]:
    """Compare the routes of a training pass over prompt and answer, of prefill, and of decoding."""
    if not subject.method.routes:
        yield Finding(OK, "routing", f"method {subject.method.name} has no router")
        return
    config = subject.config
    rows = Rows(sample(subject, ROWS), config.data.max_length if config.data.pack else None)
    examples = [example for row in rows for example in row]
    with Console().loading("base") as progress:
        base = _load(subject, progress)
    adapter, origin = _adapter(subject, base)
    placed: Adapter = jax.device_put(adapter, state_shardings(subject.mesh, adapter))
    trained = _trained(subject, placed, base, rows)
    prefilled, after = _decoded(subject, placed, decode_layout(base), examples)
    exact = config.model.dtype == "float32" and jax.default_backend() == "cpu"
    yield parity_finding(trained, prefilled, EXACT if exact else ROUNDED, f"{len(examples)} rows, {origin}")
    yield carried_finding(prefilled.weights, after)


def parity_finding(trained: Routes, prefilled: Routes, tolerance: float, what: str) -> Finding:
    """Check that two passes chose the same experts with the same probabilities.

    Args:
      tolerance: largest difference of two probabilities. A choice between two experts that are closer than
        twice this is a tie; layers after a tie that fell differently have different inputs.
    """
    chosen = trained.weights != 0
    differs = (chosen != (prefilled.weights != 0)).any(axis=-1)
    falling = -np.sort(-trained.probs, axis=-1)
    k = int(chosen[0, 0].sum())
    margin = falling[..., k - 1] - falling[..., min(k, falling.shape[-1] - 1)]
    ties = differs & (margin <= 2 * tolerance)
    comparable = np.cumsum(ties, axis=0) - ties == 0
    distance = float(np.abs(trained.probs - prefilled.probs)[comparable].max())
    wrong = int((differs & ~ties & comparable).sum())
    said = f"{what}: training and prefill differ by {distance:.1e} in probability, at most {tolerance:.0e}"
    if wrong or not distance <= tolerance:
        do = "prompts, padding or layout are not the same in both; report it with this line"
        return Finding(FAIL, "routing", f"{said}, and in {wrong} of {differs.size} choices of experts: {do}")
    if ties.any():
        return Finding(WARN, "routing", f"{said}; {int(ties.sum())} of {differs.size} choices are ties")
    return Finding(OK, "routing", f"{said}; the same experts in all {differs.size} choices")


def carried_finding(given: Float[np.ndarray, "L N E"], after: Float[np.ndarray, "L N E"]) -> Finding:
    """Check that decoding still carries the route of prefill, to the bit."""
    if not np.array_equal(given, after):
        said = f"decoding changed the route of {int((given != after).any(axis=(0, 2)).sum())} rows"
        return Finding(FAIL, "routing", f"{said}: it must read it only; report it with this line")
    layers = len(given)
    return Finding(OK, "routing", f"decoding carries the route of {layers} layers unchanged, {STEPS} steps")


def _load(subject: Subject, progress: Progress) -> Base:
    """Load the base in the layout of ``train.py``."""
    base = load_leaves(
        subject.directory,
        subject.model,
        subject.config.model.dtype,
        lambda path: base_sharding(subject.mesh, path),
        quantize=subject.config.model.quantize,
        progress=progress,
    )
    return with_layout(base, subject.mesh)


def _adapter(subject: Subject, base: Base) -> tuple[Adapter, str]:
    """The best adapter of the workdir, or a fresh one, and a description of it."""
    if subject.workdir is not None:
        try:
            step = newest_step(subject.workdir)[1]
        except UserError:
            pass  # reported by the check of the workdir
        else:
            adapter, metadata = read_adapter(subject.workdir)
            require_its_base(metadata, subject.workdir, subject.directory)
            return adapter, f"the adapter of step {step}"
    key, shape = jax.random.key(subject.config.train.seed), adapter_shape(subject.model)
    return init_adapter(subject.method, key, shape, frozen_kernels(base)), "a fresh adapter"


def _rows_of(subject: Subject, count: int) -> int:
    """The number of rows, raised to what the devices can divide."""
    parts = mesh_layout(subject.mesh).row_parts
    return -(-count // parts) * parts


def _trained(subject: Subject, adapter: Adapter, base: Base, rows: Sequence[Sequence[Example]]) -> Routes:
    """The routes of a training pass over prompts and answers, packed if the run packs."""
    longest = max(sum(len(example.tokens) for example in row) for row in rows)
    model, count = subject.model, _rows_of(subject, len(rows))
    batch = collate(rows, -(-longest // MULTIPLE) * MULTIPLE, count, max(map(len, rows)))
    attend = attend_over(subject.mesh)

    def routed(adapter: Adapter, base: Base, batch: Batch) -> Route | None:
        return forward(base, model, batch, adapter=adapter, attend=attend).route

    route = jax.jit(routed)(adapter, base, place(batch, batch_sharding(subject.mesh)))
    if route is None:
        raise AssertionError("a method that routes gives a route in training")
    return Routes.of(route)


def _decoded(
    subject: Subject, adapter: Adapter, base: Base, examples: Sequence[Example]
) -> tuple[Routes, np.ndarray]:
    """The routes of prefill over the prompts alone, and the weights that decoding carries after some steps.

    Args:
      base: in the decode layout.
    """
    model, count = subject.model, len(examples)
    prompts = [example.tokens[: example.prompt_length].tolist() for example in examples]
    longest, rows = max(map(len, prompts)), _rows_of(subject, count)
    adapters, layout = AdapterStack.single(adapter_decode_layout(adapter, base)), device_layout(base.devices)
    length = adapters.method.prefix_length + longest + STEPS + 1
    scopes = [example.route_tokens for example in examples]
    batch = place(collate_prompts(prompts, longest, 0, rows, scopes), batch_sharding(subject.mesh))
    prefilled, route = prefill(base, adapters, np.int32(0), batch, model, length, layout)
    if route is None:
        raise AssertionError("a method that routes gives a route in prefill")
    settings = [GenerationSettings(max_new_tokens=STEPS + 1, ignore_eos=True)] * rows
    every = prompts + [[0]] * (rows - count)
    sampler = make_sampler(settings, [0] * rows, every, model.eos_ids, model.vocab_size, False)
    state = empty_state(model, base.dtype, sampler, None, rows, length, routed=True)
    places, plan = np.arange(rows, dtype=np.int32), Plan.of(settings)
    state, _ = admit(state, prefilled, places, np.zeros(rows, np.int32), sampler, None, plan, layout)
    state, _ = decode_chunk(base, adapters, state, model, STEPS, plan, layout)
    if state.route is None:
        raise AssertionError("a method that routes carries a route")
    carried = np.stack([np.asarray(layer)[:count, 0] for layer in to_host(state.route)])
    routes = Routes.of(route)
    return Routes(routes.probs[:, :count], routes.weights[:, :count]), carried
