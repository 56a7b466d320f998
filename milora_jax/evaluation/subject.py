"""What is scored: a run, an exported adapter on its base, or a plain base."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from milora_jax.adapters.protocol import Adapter
from milora_jax.base.fingerprint import base_fingerprint
from milora_jax.base.hf_config import read_model_config
from milora_jax.base.load import load_base
from milora_jax.base.modules import Base
from milora_jax.base.source import model_directory
from milora_jax.base.transformer import adapter_decode_layout
from milora_jax.cli import Console
from milora_jax.config import TEMPLATES, EvalSection
from milora_jax.data.chat import template_source
from milora_jax.data.tokens import load_tokenizer
from milora_jax.errors import UserError
from milora_jax.model_config import ModelConfig
from milora_jax.storage.adapters import read_adapter, require_its_base
from milora_jax.storage.workdir import read_workdir_config


@dataclass(frozen=True)
class Named:
    """What a command line names, with what a run says of itself filled in.

    Attributes:
      adapter: a workdir or an export; None scores the plain base.
      base: directory or name of the base, see ``base.source``.
      dtype: of the base.
      quantize: of the base, where there is no adapter that says.
      template: one of ``config.TEMPLATES``.
      tests: the run's ``data.test``.
      eval: the run's settings of evaluations; None where there is no run.
    """

    adapter: Path | None
    base: str
    dtype: str
    quantize: str
    template: str
    tests: str
    eval: EvalSection | None


@dataclass(frozen=True)
class Subject:
    """A model whose adapter and tokenizer are read, and whose base is not yet.

    Attributes:
      adapter: as it is stored, in the stacked layout.
      fingerprint: SHA-256 of the adapter's settings and parameters; "" without one.
      base_fingerprint: see ``base.fingerprint``.
      chat_template: program text of the chat template that words prompts; "" where none does.
    """

    named: Named
    directory: Path
    config: ModelConfig
    tokenizer: Any
    adapter: Adapter | None
    quantize: str
    fingerprint: str
    base_fingerprint: str
    chat_template: str

    def load(self) -> tuple[Base, Adapter | None]:
        """Base and adapter in the decode layout."""
        with Console().loading("base") as progress:
            base, _ = load_base(
                self.directory, self.named.dtype, decode=True, quantize=self.quantize, progress=progress
            )
        return base, None if self.adapter is None else adapter_decode_layout(self.adapter, base)


def named_subject(
    workdir: Path | None,
    adapter: Path | None,
    base: str | None,
    template: str | None,
    dtype: str | None,
    plain: bool,
) -> Named:
    """What the options name together.

    Args:
      plain: leave the adapter away.

    Raises:
      UserError: options that do not go together, or a workdir that is none.
    """
    if workdir is None:
        if base is None:
            missing = (
                "--base DIR beside --adapter" if adapter else "--workdir DIR, or --adapter DIR --base DIR"
            )
            raise UserError(f"command line: expected {missing}")
        return Named(
            adapter=None if plain else adapter,
            base=base,
            dtype=dtype or "float32",
            quantize="none",
            template=template or TEMPLATES[0],
            tests="",
            eval=None,
        )
    if adapter is not None:
        raise UserError("command line: expected --workdir or --adapter, not both")
    run = read_workdir_config(workdir)
    return Named(
        adapter=None if plain else workdir,
        base=base or run.model.path,
        dtype=dtype or run.model.dtype,
        quantize=run.model.quantize,
        template=template or run.data.template,
        tests=run.data.test,
        eval=run.eval,
    )


def read_subject(named: Named) -> Subject:
    """Read everything but the base's weights.

    Raises:
      UserError: a file is missing, damaged, or of another base than the adapter's.
    """
    directory = model_directory(named.base)
    adapter, quantize, fingerprint = None, named.quantize, ""
    if named.adapter is not None:
        adapter, metadata = read_adapter(named.adapter)
        quantize = require_its_base(metadata, named.adapter, directory)
        fingerprint = _fingerprint(adapter, metadata["adapter"])
    tokenizer = load_tokenizer(str(directory))
    return Subject(
        named=named,
        directory=directory,
        config=read_model_config(directory),
        tokenizer=tokenizer,
        adapter=adapter,
        quantize=quantize,
        fingerprint=fingerprint,
        base_fingerprint=base_fingerprint(directory),
        chat_template=template_source(tokenizer) if named.template == "chat" else "",
    )


def _fingerprint(adapter: Adapter, settings: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapter.params):
        values = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {values.dtype} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
