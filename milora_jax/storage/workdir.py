"""What a finished or running workdir of ``train.py`` says of itself."""

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
    """The config of the run in a workdir.

    Raises:
      UserError: the folder is no workdir.
    """
    if not (workdir / CONFIG_NAME).is_file():
        raise UserError(f"{str(workdir)!r} is no workdir: it holds no {CONFIG_NAME}")
    values = read_json(workdir / CONFIG_NAME)
    if isinstance(values, dict) and isinstance(values.get("adapter"), dict):
        values["adapter"] = dataclasses.asdict(stored_settings(values["adapter"]))
    if isinstance(values, dict) and isinstance(values.get("data"), dict):
        # The prompts of a run from before this was a setting were written so.
        values["data"].setdefault("special_tokens", UNSTORED.special_tokens)
    return Config.from_dict(values)


def prompt_format_of(source: Path, stored: PromptFormat) -> PromptFormat:
    """How the prompts of an adapter are written; where it does not say, what the config of its run does.

    Args:
      source: a workdir or an exported adapter.
      stored: with the adapter, see ``prompt_format.stored_prompt_format``.
    """
    if stored != UNSTORED or not (source / CONFIG_NAME).is_file():
        return stored
    return read_workdir_config(source).prompt_format
