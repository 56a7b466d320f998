"""``python -m milora_jax.storage push``: upload an adapter to the Hugging Face Hub, with a model card."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from milora_jax.adapters.registry import build_method, stored_settings
from milora_jax.addresses import HUB, on_hub
from milora_jax.base.json_files import parse_json_object
from milora_jax.base.source import hub_name
from milora_jax.config import Config
from milora_jax.errors import UserError
from milora_jax.evaluation.card import Card
from milora_jax.storage.adapters import best_metadata
from milora_jax.storage.export import ORIGIN_FILE, export_milora, export_orbax, read_origin
from milora_jax.storage.exported import is_exported
from milora_jax.storage.files import read_bytes, read_json, scratch_directory
from milora_jax.storage.hub import push_adapter
from milora_jax.storage.mirror import PREFIX, local_copy
from milora_jax.storage.peft_settings import PEFT_CONFIG
from milora_jax.storage.verify import findings
from milora_jax.storage.workdir import CONFIG_NAME, read_workdir_config

_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")


def add_push(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("adapter", type=local_copy, help="workdir of train.py, an export, or what PEFT saved")
    add("to", metavar="hf://OWNER/NAME", help="repository, which is made where there is none")
    add("--private", action="store_true", help="make a new repository private")
    add("--run", type=local_copy, help="workdir whose settings and scores the card has (default: ADAPTER)")
    add("--base-name", default="", help="OWNER/NAME of the base on the Hub (default: the run's hf:// name)")


def push(asked: argparse.Namespace, log: Callable[[str], None]) -> None:
    """Check the adapter, write its card, and upload both.

    Raises:
      UserError: the adapter is damaged or is none, or the Hub does not take it.
    """
    address = on_hub(asked.to)
    if address is None:
        raise UserError(f"{asked.to!r}: expected {HUB}OWNER/NAME to push to")
    source, name = asked.adapter, asked.base_name
    if name and not _ON_HUB.fullmatch(name):
        raise UserError(f"--base-name {name!r}: expected OWNER/NAME")
    with scratch_directory(PREFIX) as scratch:
        folder, form, metadata = _portable(source, scratch / "adapter")
        run = asked.run or (source if (source / CONFIG_NAME).is_file() and form != "peft" else None)
        config, summary = (None, {}) if run is None else _run_of(run, metadata)
        name = name or _base_name(folder, form, config)
        if not name:
            log("note: the card does not name the base: --base-name OWNER/NAME does")
        settings = metadata.get("adapter", {})
        card = Card(str(address), form, name, settings, config, summary)
        commit, carded = push_adapter(folder, address, card.text(), asked.private)
    if not carded:
        log("note: the repository has a README.md, which is left as it is")
    print(f"pushed to {address}: {commit}")


def _portable(source: Path, out: Path) -> tuple[Path, str, Mapping[str, Any]]:
    """The directory to upload, who can load it, and the adapter's metadata.

    A run's best adapter is written to ``out``, as ``milora`` where its method has that form, else as
    ``orbax``; other directories are uploaded as they are.
    """
    peft = (source / PEFT_CONFIG).is_file()
    if not peft and not is_exported(source):
        if (source / ORIGIN_FILE).is_file():
            raise UserError(
                f"{str(source)!r} is a whole model: expected an adapter; 'hf upload' takes models"
            )
        metadata = best_metadata(source)
        portable = build_method(stored_settings(metadata["adapter"])).portable
        (export_milora if portable else export_orbax)(source, out)
        return out, "milora" if portable else "orbax", metadata
    for line in (line for lines in findings(source, None).values() for line in lines):
        raise UserError(f"{str(source)!r} cannot be pushed: {line}")
    if not peft:
        return source, "milora", best_metadata(source)
    return source, "peft", read_origin(source) if (source / ORIGIN_FILE).is_file() else {}


def _run_of(run: Path, metadata: Mapping[str, Any]) -> tuple[Config, Mapping[str, Any]]:
    """The settings of a run and its summary.

    Raises:
      UserError: it is no workdir, or the adapter is not of this run.
    """
    config, theirs = read_workdir_config(run), best_metadata(run)
    for fact in ("base_fingerprint", "adapter"):
        if metadata.get(fact) != theirs[fact]:
            raise UserError(f"--run {str(run)!r}: its {fact} is not that of the adapter")
    summary = run / "summary.json"
    return config, read_json(summary) if summary.is_file() else {}


def _base_name(folder: Path, form: str, config: Config | None) -> str:
    """The name of the base on the Hub, where the run or PEFT's file gives one; else ""."""
    if config is not None and config.model.path.startswith(HUB):
        return hub_name(config.model.path)
    if form != "peft":
        return ""
    values = parse_json_object(read_bytes(folder / PEFT_CONFIG), PEFT_CONFIG)
    name = str(values.get("base_model_name_or_path") or "")
    return name if _ON_HUB.fullmatch(name) and not Path(name).exists() else ""
