"""The subject of an examination: the settings of a run, and what several checks need, read once."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from milora_jax.adapters.protocol import Method
from milora_jax.adapters.registry import build_method
from milora_jax.base.hf_config import read_model_config
from milora_jax.base.source import model_directory
from milora_jax.config import Config
from milora_jax.data.records import Record
from milora_jax.data.tokens import Example, load_tokenizer
from milora_jax.errors import UserError
from milora_jax.model_config import ModelConfig
from milora_jax.parallel.mesh import make_mesh


@dataclass
class Subject:
    """The run that is examined.

    Attributes:
      given: the settings of ``--config``; None without it.
      kept: the settings of the workdir; None without one, or where they cannot be read.
      workdir: the workdir of ``train.py``; None without one.
      records: rows by split (train, dev, test) and source, as far as they could be read.
      examples: encoded records of train and dev, of any length.
    """

    given: Config | None
    kept: Config | None
    workdir: Path | None
    records: dict[str, dict[str, list[Record]]] = field(default_factory=dict)
    examples: dict[str, list[Example]] = field(default_factory=dict)

    @property
    def config(self) -> Config:
        """The settings in effect: the given ones, else the workdir's."""
        config = self.given or self.kept
        if config is None:
            raise UserError("no settings: give --config or --workdir")
        return config

    @cached_property
    def method(self) -> Method:
        """The fine-tuning method."""
        return build_method(self.config.adapter)

    @cached_property
    def directory(self) -> Path:
        """The directory of the base."""
        return model_directory(self.config.model.path)

    @cached_property
    def model(self) -> ModelConfig:
        """The config of the base."""
        return read_model_config(self.directory)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the base."""
        return load_tokenizer(str(self.directory))

    @cached_property
    def mesh(self) -> Mesh:
        """All devices, arranged as in the config."""
        return make_mesh(self.config.mesh)
