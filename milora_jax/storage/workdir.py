"""The settings that a workdir of ``train.py`` stores."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from milora_jax.adapters.registry import stored_settings
from milora_jax.config import Config
from milora_jax.errors import UserError
from milora_jax.prompt_format import UNSTORED, PromptFormat
from milora_jax.storage.files import read_json

CONFIG_NAME = "config.json"


def read_workdir_config(workdir: Path) -> Config:
    """Read the config of the run in a workdir.

    Raises:
      UserError: the folder is no workdir.
    """
    if not (workdir / CONFIG_NAME).is_file():
        raise UserError(f"{str(workdir)!r} is no workdir: it holds no {CONFIG_NAME}")
    values = read_json(workdir / CONFIG_NAME)
    if isinstance(values, dict) and isinstance(values.get("adapter"), dict):
        values["adapter"] = dataclasses.asdict(stored_settings(values["adapter"]))
    if isinstance(values, dict) and isinstance(values.get("data"), dict):
        # Runs from before this setting wrote their prompts so.
        values["data"].setdefault("special_tokens", UNSTORED.special_tokens)
    return Config.from_dict(values)


def prompt_format_of(source: Path, stored: PromptFormat) -> PromptFormat:
    """The prompt format of an adapter; where it does not state one, that of its run's config.

    Args:
      source: a workdir or an exported adapter.
      stored: the format stored with the adapter, see ``prompt_format.stored_prompt_format``.
    """
    if stored != UNSTORED or not (source / CONFIG_NAME).is_file():
        return stored
    return read_workdir_config(source).prompt_format
