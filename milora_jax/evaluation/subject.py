"""The subject of an evaluation: a run, an exported adapter on its base, or a plain base.

It is read in three steps, so that mistakes are reported before time is spent: the names in the options
(:func:`named_subject`), all files except the base's weights (:func:`read_subject`), and the weights
(:meth:`Subject.load`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from milora_jax.adapters.protocol import Adapter
from milora_jax.base.attention import DeviceLayout
from milora_jax.base.fingerprint import base_fingerprint
from milora_jax.base.hf import load_leaves
from milora_jax.base.hf_config import read_model_config
from milora_jax.base.modules import Base
from milora_jax.base.source import model_directory
from milora_jax.base.transformer import adapter_decode_layout
from milora_jax.config import DTYPES, EvalSection, parse_mesh
from milora_jax.console import Console
from milora_jax.data.chat import template_source
from milora_jax.data.sources import Source, run_sources
from milora_jax.data.tokens import load_tokenizer
from milora_jax.errors import UserError, one_of
from milora_jax.model_config import ModelConfig
from milora_jax.parallel.mesh import check_divides, make_mesh
from milora_jax.parallel.processes import is_first, place, several
from milora_jax.parallel.rules import base_sharding, layout_over, with_layout
from milora_jax.prompt_format import PromptFormat
from milora_jax.storage.adapters import require_its_base
from milora_jax.storage.imported import read_any_adapter
from milora_jax.storage.workdir import CONFIG_NAME, read_workdir_config


@dataclass(frozen=True)
class Named:
    """The names in the options, completed from the settings of a run.

    Attributes:
      adapter: a workdir or an export; None is the plain base.
      base: directory or name of the base, see ``base.source``.
      dtype: dtype of the base.
      quantize: quantisation of the base; "" is that of the adapter's training, or none without an adapter.
      prompt_format: format of the run; None, where there is no run, is the adapter's.
      template: the requested template; "" is that of ``prompt_format``.
      otherwise: the template where none is known; "" is the tokenizer's own, or ``alpaca`` without one.
      tests: the sources of the run's ``data.test``.
      eval: the run's evaluation settings; None where there is no run.
      mesh: the mesh on which the run scores, or one that suits any base.
    """

    adapter: Path | None
    base: str
    dtype: str
    quantize: str
    prompt_format: PromptFormat | None
    template: str
    otherwise: str
    tests: list[Source]
    eval: EvalSection | None
    mesh: str = "fsdp=-1"


@dataclass(frozen=True)
class Model:
    """The model that answers.

    Attributes:
      name: name of the base as it was given.
      base, adapter: both in the decode layout; an adapter of None is the plain base.
      prompt_format: format of its prompts.
      layout: of rows and heads over several devices; None on one.
    """

    name: str
    base: Base
    config: ModelConfig
    tokenizer: Any
    adapter: Adapter | None
    prompt_format: PromptFormat
    layout: DeviceLayout | None = None


@dataclass(frozen=True)
class Subject:
    """A model whose adapter and tokenizer are loaded, but not its base.

    Attributes:
      adapter: the stored adapter, in the stacked layout.
      settings: settings of the adapter; empty without one.
      prompt_format: format of its prompts.
    """

    named: Named
    directory: Path
    config: ModelConfig
    tokenizer: Any
    adapter: Adapter | None
    settings: Mapping[str, Any]
    quantize: str
    prompt_format: PromptFormat

    @property
    def chat_template(self) -> str:
        """Program text of the chat template of its prompts; "" if there is none."""
        return template_source(self.tokenizer) if self.prompt_format.template == "chat" else ""

    def fingerprint(self) -> str:
        """SHA-256 of the adapter's settings and parameters; "" without an adapter."""
        if self.adapter is None:
            return ""
        digest = hashlib.sha256(json.dumps(dict(self.settings), sort_keys=True).encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.adapter.params):
            values = np.asarray(leaf)
            digest.update(f"{jax.tree_util.keystr(path)} {values.dtype} {values.shape}".encode())
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    def identity(self) -> dict[str, Any]:
        """Everything of the model that its answers depend on, as JSON, to be stored beside them."""
        return {
            "adapter": self.fingerprint(),
            "base": base_fingerprint(self.directory),
            "dtype": self.named.dtype,
            "quantize": self.quantize,
            "prompt_format": self.prompt_format.to_dict(),
            "chat_template": hashlib.sha256(self.chat_template.encode()).hexdigest()[:16],
            "end_tokens": sorted(self.config.eos_ids),  # in a file that the base's fingerprint does not cover
        }

    def load(self, mesh: Mesh | None = None) -> Model:
        """Load the base.

        Args:
          mesh: the devices that divide it; None loads it onto the first one.
        """
        named, config, adapter = self.named, self.config, self.adapter
        one_of("dtype", named.dtype, DTYPES)
        places = None if mesh is None else functools.partial(base_sharding, mesh)
        with Console(silent=not is_first()).loading("base") as progress:
            base = load_leaves(self.directory, config, named.dtype, places, True, self.quantize, progress)
        base = with_layout(base, mesh)
        if adapter is not None:
            placed = adapter if mesh is None else place(adapter, base.everywhere)
            adapter = adapter_decode_layout(placed, base)
        layout = layout_over(mesh)
        return Model(named.base, base, config, self.tokenizer, adapter, self.prompt_format, layout)

    def mesh(self, asked: str, rows: int) -> Mesh | None:
        """The devices that divide the base and the rows; None for the first one alone.

        Args:
          asked: value of ``--mesh``; where it is empty, several processes take the mesh of the run's scoring,
            and of an adapter or a base without a run ``fsdp=-1``.
          rows: of a batch.

        Raises:
          UserError: the mesh does not suit the devices, the model or the batch.
        """
        if not asked and not several():
            return None
        mesh = make_mesh(parse_mesh(asked or self.named.mesh))
        check_divides(mesh, self.config, {"--batch-size": rows}, heads=False)
        return mesh


def named_subject(
    workdir: str | Path | None = None,
    adapter: str | Path | None = None,
    base: str | None = None,
    *,
    template: str | None = None,
    otherwise: str = "",
    dtype: str | None = None,
    quantize: str | None = None,
    plain: bool = False,
) -> Named:
    """Combine names in options; one that is None or empty is not given.

    Args:
      workdir: workdir of ``train.py``: its base, its best adapter, its template.
      adapter: an export or a workdir on ``base``, instead of ``workdir``; its template counts as well.
      base: directory or name of a base; with a workdir, the place where its base is now.
      template: default: the run's or the adapter's; where none is known ``otherwise``, see :class:`Named`.
      dtype, quantize: default: the run's; without a run ``float32`` and the quantisation of the adapter's
        base.
      plain: ignore the adapter.

    Raises:
      UserError: options exclude each other, or the workdir is none.
    """
    if workdir and adapter:
        raise UserError("expected a workdir or an adapter, not both: an adapter is given with its base")
    if workdir:
        run = read_workdir_config(Path(workdir))
        return Named(
            adapter=None if plain else Path(workdir),
            base=base or run.model.path,
            dtype=dtype or run.model.dtype,
            quantize=quantize or (run.model.quantize if plain else ""),
            prompt_format=run.prompt_format,
            template=template or "",
            otherwise=otherwise,
            tests=run_sources(run.data)["test"],
            eval=run.eval,
            mesh=run.eval.mesh or ",".join(f"{axis}={size}" for axis, size in vars(run.mesh).items()),
        )
    if not base:
        raise UserError("there is no base: expected a workdir, or a base and perhaps an adapter on it")
    is_run = adapter and (Path(adapter) / CONFIG_NAME).is_file()
    return Named(
        adapter=None if plain or not adapter else Path(adapter),
        base=str(base),
        dtype=dtype or "float32",
        quantize=quantize or "",
        prompt_format=read_workdir_config(Path(adapter)).prompt_format if adapter and is_run else None,
        template=template or "",
        otherwise=otherwise,
        tests=[],
        eval=None,
    )


def read_subject(named: Named) -> Subject:
    """Load everything but the base's weights.

    Raises:
      UserError: a file is missing or damaged, or belongs to another base than the adapter's.
    """
    directory = model_directory(named.base)
    adapter, settings, kept = None, {}, "none"
    if named.adapter is not None:
        adapter, metadata = read_any_adapter(named.adapter, directory)
        kept, settings = require_its_base(metadata, named.adapter, directory), metadata["adapter"]
    tokenizer = load_tokenizer(str(directory))
    known = PromptFormat(template="") if adapter is None else adapter.prompt_format
    known = named.prompt_format or known
    route_on = "prompt" if adapter is None else adapter.method.route_scope
    own = "chat" if tokenizer.chat_template else "alpaca"
    template = named.template or known.template or named.otherwise or own
    return Subject(
        named=named,
        directory=directory,
        config=read_model_config(directory),
        tokenizer=tokenizer,
        adapter=adapter,
        settings=settings,
        quantize=named.quantize or kept,
        prompt_format=dataclasses.replace(known, template=template, route_on=route_on),
    )
