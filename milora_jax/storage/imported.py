"""Import adapters of other programs: a LoRA or DoRA of PEFT, also as the experts of a new MiLoRA."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from milora_jax.adapters.low_rank import init_pairs
from milora_jax.adapters.milora import MiLoRA, MiLoRAParams
from milora_jax.adapters.protocol import Adapter
from milora_jax.adapters.records import Decomposed, LowRank, Record, Rescaled
from milora_jax.adapters.registry import METHOD_CLASSES, adapter_shape, build_method
from milora_jax.adapters.targets import written_targets
from milora_jax.base.fingerprint import base_fingerprint
from milora_jax.base.hf import plain_tensors
from milora_jax.base.hf_config import read_model_config
from milora_jax.base.specs import MODULE_PATHS
from milora_jax.config import AdapterSection
from milora_jax.errors import UserError, require
from milora_jax.prompt_format import PromptFormat, stored_prompt_format
from milora_jax.storage.adapters import adapter_metadata, read_adapter, require_its_base
from milora_jax.storage.export import ORIGIN_FILE, read_origin
from milora_jax.storage.exported import write_exported
from milora_jax.storage.files import new_directory
from milora_jax.storage.manifest import MANIFEST, verify_manifest
from milora_jax.storage.mirror import fetched
from milora_jax.storage.peft import PeftPairs, read_peft, require_unfused
from milora_jax.storage.peft_settings import PEFT_CONFIG
from milora_jax.types import EXPERTS

log = logging.getLogger("milora_jax.storage")

LARGEST_SEED = 2**32 - 1

BECOMES = {"lora": ("lora", "milora"), "dora": ("dora", "midora")}
"""The methods that a kind of PEFT adapter may be imported as; the first is its own."""


def _prompt_format(source: Path, base: Path) -> PromptFormat:
    """The prompt format of a PEFT adapter.

    Our own exports state it; they must be undamaged and made for this base. Other adapters have no known
    template, and their prompts follow the tokenizer's own rule.
    """
    if not ((source / MANIFEST).exists() or (source / ORIGIN_FILE).exists()):
        return PromptFormat(template="")
    verify_manifest(source)
    origin = read_origin(source)
    require_its_base(origin, source, base)
    return stored_prompt_format(origin.get("prompt_format"), str(source / ORIGIN_FILE))


def read_any_adapter(path: str | Path, base: Path, quantize: str = "none") -> tuple[Adapter, dict[str, Any]]:
    """An adapter of ours, as ``storage.adapters.read_adapter`` reads it, or one that PEFT saved, as it is.

    Nothing is written. What an address ``gs://BUCKET/PATH`` has is fetched anew each time, and the Hub is
    asked each time whether ``hf://OWNER/NAME`` has changed.

    Args:
      base: Hugging Face directory of the base. A PEFT adapter of others does not say which base it is for,
        and gets the fingerprint of this one.
      quantize: how the base is kept, of which a PEFT adapter says nothing either.

    Raises:
      UserError: by name, for whatever is missing, damaged, unknown or does not fit the base.
    """
    with fetched(path) as folder:
        if not (folder / PEFT_CONFIG).is_file():
            return read_adapter(folder)
        adapter, said = read_peft_adapter(folder, base, quantize=quantize)
    for line in said:
        log.info("%s: %s", path, line)
    return adapter, adapter_metadata(
        adapter.method, adapter.shape, base_fingerprint(base), quantize, adapter.prompt_format
    )


def import_peft(source: Path, base: Path, out: Path, method: str = "", seed: int = 0) -> list[str]:
    """Write a PEFT adapter in the portable form of ``storage.exported``.

    Args:
      out: a new or an empty directory.
      source, base, method, seed: as :func:`read_peft_adapter` takes them.

    Returns:
      One line per thing worth knowing.

    Raises:
      UserError: as :func:`read_peft_adapter`.
    """
    adapter, said = read_peft_adapter(source, base, method, seed)
    metadata = adapter_metadata(
        adapter.method, adapter.shape, base_fingerprint(base), "none", adapter.prompt_format
    )
    with new_directory(out) as partial:
        write_exported(partial, adapter, metadata)
    return said


def read_peft_adapter(
    source: Path, base: Path, method: str = "", seed: int = 0, quantize: str = "none"
) -> tuple[Adapter, list[str]]:
    """A LoRA or DoRA that PEFT saved.

    As a MiLoRA or MiDoRA its pairs are the experts; the router is fresh and the other settings are the
    method's defaults.

    Args:
      source: directory that PEFT saved.
      base: Hugging Face directory of the base that it is for, whose fingerprint it gets.
      method: one of :data:`BECOMES`; empty takes what the adapter is.
      seed: of the router, and of the pairs of modules and layers that have none.
      quantize: how the base is kept.

    Returns:
      The adapter, and one line per thing worth knowing.

    Raises:
      UserError: something in ``source`` is missing, unknown or does not fit the base; the error names it.
    """
    require(0 <= seed <= LARGEST_SEED, "--seed", seed, f"0 to {LARGEST_SEED}")
    model = read_model_config(base)
    require_unfused(model, base)
    shape = adapter_shape(model)
    prompt_format = _prompt_format(source, base)
    found = read_peft(source, shape)
    name = method or found.kind
    if name not in BECOMES[found.kind]:
        expected = " or ".join(BECOMES[found.kind])
        raise UserError(f"{source} holds a {found.kind}, which cannot become a {name}: expected {expected}")
    pairs_key, router_key = jax.random.split(jax.random.key(seed))
    # As what it is, its modules without pairs stay the frozen ones; experts are all seven.
    modules = tuple(found.pairs) if name == found.kind else EXPERTS
    missing = _missing(found, modules, shape.num_layers)
    if missing and found.kind == "dora" and quantize != "none":
        raise UserError(
            f"{source}: no pairs for {missing}: expected a DoRA with a pair there for a base kept as "
            f"{quantize!r}, whose magnitudes are not those of its files"
        )
    said = list(found.said)
    pairs = found.pairs
    if missing:
        pairs = _completed(found, modules, init_pairs(pairs_key, shape, found.rank), base)
        said.append(f"no pairs for {missing}: theirs are fresh and change nothing")
    section = AdapterSection(
        method=name,
        rank=found.rank,
        alpha=found.alpha,
        use_rslora=found.use_rslora,
        dropout=found.dropout,
        target_modules=written_targets(modules) if name == found.kind else None,
    )
    if METHOD_CLASSES[name].routes:
        section = dataclasses.replace(section, features="rms")  # others are measured on prompts
    built = build_method(section)
    params = pairs
    if isinstance(built, MiLoRA):
        params = MiLoRAParams(pairs, built.router.init(router_key, shape.num_layers, shape.hidden_size))
        said.append(
            f"the router is fresh: it chooses {built.top_k} of 7 experts at random until it is trained"
        )
    return Adapter(params, built, shape, prompt_format), said


def _missing(found: PeftPairs, modules: Iterable[str], num_layers: int) -> str:
    """Those of the modules that have no pair, in all layers or in some; empty if every one has."""
    parts = [module for module in modules if module not in found.pairs]
    for module, present in found.present.items():
        if not present.all():
            parts.append(f"{module} in {num_layers - int(present.sum())} of {num_layers} layers")
    return ", ".join(parts)


def _completed(
    found: PeftPairs, modules: Iterable[str], fresh: Mapping[str, LowRank], base: Path
) -> dict[str, Record]:
    """The pairs of the modules in all layers; where the adapter has none, a fresh one, whose B is zero.

    The magnitudes of a fresh pair are the norms of the frozen weight's rows, as at the start of a DoRA.
    """
    pairs: dict[str, Record] = {}
    files = plain_tensors(base) if found.kind == "dora" else {}
    for module in modules:
        mine, new = found.pairs.get(module), fresh[module]
        layers = len(new.a)
        present = found.present.get(module, np.zeros(layers, bool))
        a, b = new.a, new.b
        if mine is not None and not isinstance(mine, Rescaled):
            a, b = jnp.where(present[:, None, None], mine.a, new.a), mine.b
        if found.kind != "dora":
            pairs[module] = LowRank(a, b)
            continue
        norms = []
        for layer in range(layers):
            if isinstance(mine, Decomposed) and present[layer]:
                norms.append(np.asarray(mine.magnitude[layer]))
                continue
            name, size = (
                f"model.layers.{layer}.{MODULE_PATHS[module]}.weight",
                (new.b.shape[-1], new.a.shape[1]),
            )
            if name not in files or files[name].entries[name].shape != size:
                raise UserError(f"{base}: no tensor {name!r} of shape {list(size)}, whose norms a DoRA needs")
            norms.append(np.linalg.norm(files[name].whole(name).astype(np.float32), axis=1))
        pairs[module] = Decomposed(a, b, jnp.asarray(np.stack(norms)))
    return pairs
