"""Builds a service: loads the base and the adapters, and compiles all programs."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from milora_jax.base.hf import Progress, ignore, load_leaves
from milora_jax.base.hf_config import read_model_config
from milora_jax.base.source import model_directory
from milora_jax.config import DTYPES, QUANTIZE, MeshSection
from milora_jax.data.tokens import load_tokenizer
from milora_jax.errors import UserError, one_of, require
from milora_jax.generation.bank import no_log
from milora_jax.generation.engine import Engine
from milora_jax.generation.prompt_lookup import MOST_PROPOSALS
from milora_jax.parallel.mesh import check_divides, make_mesh
from milora_jax.parallel.rules import base_sharding, layout_over, with_layout
from milora_jax.serving.limits import Limits
from milora_jax.serving.loop import PLANS, DeviceLoop
from milora_jax.serving.metrics import COMPILATIONS, Metrics
from milora_jax.serving.registry import Registry
from milora_jax.serving.service import Service
from milora_jax.serving.store import AdapterStore, Model
from milora_jax.serving.template import require_bounded_template


@dataclass(frozen=True)
class Offer:
    """The base that a server serves.

    Attributes:
      base: path of the model, as ``base.source`` takes it.
      name: name of the base alone as a model.
      dtype, quantize: its dtype and quantisation.
      tensor: devices that every layer is divided over.
    """

    base: str
    name: str
    dtype: str = "float32"
    quantize: str = "none"
    tensor: int = 1

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, DTYPES)
        one_of("quantize", self.quantize, QUANTIZE)


def build_service(
    offer: Offer,
    registry: Registry,
    limits: Limits,
    progress: Progress = ignore,
    log: Callable[[str], None] = no_log,
) -> Service:
    """Load the base and its adapters, and compile all programs; the caller starts the device loop.

    Args:
      progress: called while the base is read.
      log: called with a line before the programs are compiled.

    Raises:
      UserError: naming the file or the setting that is wrong.
    """
    directory = model_directory(offer.base)
    background = ThreadPoolExecutor(4, thread_name_prefix="startup")
    template = background.submit(require_bounded_template, directory)
    tokenizers = background.submit(lambda: (load_tokenizer(str(directory)), load_tokenizer(str(directory))))
    mesh, config = _mesh(offer.tensor), read_model_config(directory)
    places = None
    if mesh is not None:
        check_divides(mesh, config, {})
        places = functools.partial(base_sharding, mesh)
    fits = limits.context != 1 and limits.context <= config.max_positions
    require(fits, "--context", limits.context, f"2 to the model's {config.max_positions} positions, or 0")
    most = min(MOST_PROPOSALS, (limits.context or config.max_positions) - 1)
    require(limits.prompt_lookup <= most, "--prompt-lookup", limits.prompt_lookup, f"0 to {most}")
    base = load_leaves(directory, config, offer.dtype, places, True, offer.quantize, progress)
    base = with_layout(base, mesh)
    adapters = registry.to_load()
    store = None
    if offer.name in adapters:
        raise UserError(f"the base is called {offer.name!r}, and so is an adapter: give it another --name")
    if adapters:
        store = AdapterStore(
            Model(base, config, directory, offer.quantize),
            {name: each.path for name, each in adapters.items()},
            limits.adapters_on_device,
            ThreadPoolExecutor(1, thread_name_prefix="adapters"),
            rank=limits.max_lora_rank,
            pinned=frozenset(name for name, each in adapters.items() if each.pinned),
            log=log,
        )
    engine = Engine(
        base,
        config,
        None if store is None else store.bank.adapters,
        batch_slots=limits.rows,
        cache_length=limits.context,
        chunk=limits.chunk,
        plans=PLANS,
        prefill_budget=limits.prefill_budget,
        prefix_cache=limits.prefix_cache * 2**20,
        prompt_lookup=limits.prompt_lookup,
        layout=layout_over(mesh),
    )
    loop = DeviceLoop(engine, store, limits)
    rows, length = engine.batch_slots, engine.cache_length
    log(f"compiling for {rows} batch slots of {length} tokens: a minute, or several")
    decoding = [background.submit(program.compile) for program in engine.lower_decoding()]
    template.result()
    texts = tokenizers.result()
    loop.warm_up(decoding)
    background.shutdown()
    metrics = Metrics()
    COMPILATIONS.add(metrics.compiled)
    served = offer.name if store is None or store.has_base else ""
    service = Service(engine, loop, store, texts, served, limits, metrics)
    metrics.gauge("milora_running", "Requests in the batch", lambda: loop.running)
    metrics.gauge("milora_under_way", "Admitted requests", lambda: service.admission.active_requests)
    metrics.gauge(
        "milora_waiting_tokens", "Tokens of queued prompts", lambda: service.admission.queued_tokens
    )
    cache = engine.prefix_cache
    if cache is not None:
        name = "milora_prefix_cache"
        metrics.count(f"{name}_queries_total", "Prompt tokens looked up", lambda: cache.counts.queries)
        metrics.count(f"{name}_hits_total", "Prompt tokens found", lambda: cache.counts.hits)
        metrics.count(f"{name}_evictions_total", "Entries evicted", lambda: cache.counts.evicted)
        metrics.gauge(f"{name}_bytes", "Bytes of all entries", lambda: cache.counts.used)
    if limits.prompt_lookup:
        name, counts = "milora_prompt_lookup", loop.counts
        metrics.count(f"{name}_proposed_tokens_total", "Tokens proposed", lambda: counts.proposed_tokens)
        metrics.count(f"{name}_accepted_tokens_total", "Of these accepted", lambda: counts.accepted_tokens)
    metrics.gauge("milora_rows", "Batch slots", lambda: limits.rows)
    metrics.gauge("milora_tasks", "Tasks of the event loop", _tasks)
    metrics.gauge("milora_steps", "Steps of the device loop", lambda: loop.counts.steps)
    metrics.gauge("milora_step_failures", "Steps that raised", lambda: loop.counts.failures)
    return service


def _tasks() -> int:
    """Return the number of tasks of the running event loop; 0 without one."""
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:
        return 0


def _mesh(tensor: int) -> Mesh | None:
    """The devices of an engine; None for one.

    Raises:
      UserError: there are not as many.
    """
    devices = jax.devices()
    require(1 <= tensor <= len(devices), "--tensor", tensor, f"1 to the {len(devices)} devices that are here")
    if tensor == 1:
        return None
    return make_mesh(MeshSection(data=1, fsdp=1, tensor=tensor), devices[:tensor])
