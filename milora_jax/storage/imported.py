"""Import adapters of other programs: a LoRA or DoRA of PEFT, also as the experts of a new MiLoRA."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax

from milora_jax.adapters.low_rank import init_pairs
from milora_jax.adapters.milora import MiLoRA, MiLoRAParams
from milora_jax.adapters.protocol import Adapter
from milora_jax.adapters.registry import METHOD_CLASSES, adapter_shape, build_method
from milora_jax.adapters.targets import written_targets
from milora_jax.base.fingerprint import base_fingerprint
from milora_jax.base.hf_config import read_model_config
from milora_jax.config import AdapterSection
from milora_jax.errors import UserError, require
from milora_jax.prompt_format import PromptFormat, stored_prompt_format
from milora_jax.storage.adapters import adapter_metadata, read_adapter, require_its_base
from milora_jax.storage.export import ORIGIN_FILE, read_origin
from milora_jax.storage.exported import write_exported
from milora_jax.storage.files import new_directory
from milora_jax.storage.manifest import MANIFEST, verify_manifest
from milora_jax.storage.mirror import fetched
from milora_jax.storage.peft import PEFT_CONFIG, read_peft, require_unfused
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

    Nothing is written. An address ``gs://BUCKET/PATH`` is fetched anew each time.

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
        adapter, said = read_peft_adapter(folder, base)
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


def read_peft_adapter(source: Path, base: Path, method: str = "", seed: int = 0) -> tuple[Adapter, list[str]]:
    """A LoRA or DoRA that PEFT saved.

    As a MiLoRA or MiDoRA its pairs are the experts; the router is fresh and the other settings are the
    method's defaults.

    Args:
      source: directory that PEFT saved.
      base: Hugging Face directory of the base that it is for, whose fingerprint it gets.
      method: one of :data:`BECOMES`; empty takes what the adapter is.
      seed: of the router, and of the experts of modules that have no pair.

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
    settings, pairs = read_peft(source, shape)
    name = method or settings.kind
    if name not in BECOMES[settings.kind]:
        expected = " or ".join(BECOMES[settings.kind])
        raise UserError(
            f"{source} holds a {settings.kind}, which cannot become a {name}: expected {expected}"
        )
    said, missing = [], [module for module in EXPERTS if module not in pairs]
    pairs_key, router_key = jax.random.split(jax.random.key(seed))
    own = name == settings.kind  # its modules without pairs stay as they are
    if missing and not own and settings.kind == "dora":
        raise UserError(f"{source}: no pairs for {', '.join(missing)}: expected a DoRA of all seven modules")
    if missing and not own:
        fresh = init_pairs(pairs_key, shape, settings.rank)
        pairs = {module: pairs.get(module, fresh[module]) for module in EXPERTS}
        said.append(f"no pairs for {', '.join(missing)}: theirs are fresh and change nothing")
    section = AdapterSection(
        method=name,
        rank=settings.rank,
        alpha=settings.alpha,
        use_rslora=settings.use_rslora,
        dropout=settings.dropout,
        target_modules=written_targets(settings.modules) if own else None,
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
