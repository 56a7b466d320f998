"""A tuned model read from the disk: base, tokenizer and adapter, ready to decode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milora_jax.adapters.protocol import Adapter
from milora_jax.base.load import load_base
from milora_jax.base.modules import Base
from milora_jax.base.source import model_directory
from milora_jax.base.transformer import adapter_decode_layout
from milora_jax.cli import Console
from milora_jax.data.tokens import load_tokenizer
from milora_jax.errors import UserError
from milora_jax.model_config import ModelConfig
from milora_jax.storage.adapters import read_adapter, require_its_base
from milora_jax.storage.workdir import read_workdir_config


@dataclass(frozen=True)
class Tuned:
    """What answers and scores.

    Attributes:
      name: of the base, as it was given.
      base, adapter: in the decode layout; without an adapter the plain base.
      template: that prompts are worded with, one of ``config.TEMPLATES``.
    """

    name: str
    base: Base
    config: ModelConfig
    tokenizer: Any
    adapter: Adapter | None
    template: str


def load_tuned(
    workdir: str | Path = "",
    base: str = "",
    adapter: str | Path = "",
    dtype: str = "",
    quantize: str = "",
) -> Tuned:
    """Load a run, or a base with an adapter or without.

    Args:
      workdir: of ``train.py``: its base, its best adapter, its template.
      base: instead of it, a model's directory or name, see ``base.source``. Its template is the tokenizer's,
        where it has one.
      adapter: on a base, an exported adapter or a workdir.
      dtype: default: the run's, else float32.
      quantize: default: as the adapter's base was kept.

    Raises:
      UserError: both or none of ``workdir`` and ``base``, or what is named is missing or does not fit.
    """
    if bool(workdir) == bool(base):
        raise UserError("expected either workdir=DIR, or base=DIR and perhaps adapter=DIR")
    if workdir and adapter:
        raise UserError("adapter is of a base: expected base=DIR,adapter=DIR, or workdir=DIR alone")
    template, kept = "", "none"
    if workdir:
        run = read_workdir_config(Path(workdir))
        base, dtype, adapter = run.model.path, dtype or run.model.dtype, workdir
        template = run.data.template
    directory = model_directory(base)
    read = None
    if adapter:
        read, metadata = read_adapter(adapter)
        kept = require_its_base(metadata, adapter, directory)
    tokenizer = load_tokenizer(str(directory))
    template = template or ("chat" if tokenizer.chat_template else "alpaca")
    with Console().loading("base") as progress:
        loaded, config = load_base(
            directory, dtype or "float32", decode=True, quantize=quantize or kept, progress=progress
        )
    laid_out = None if read is None else adapter_decode_layout(read, loaded)
    return Tuned(str(base), loaded, config, tokenizer, laid_out, template)
