"""Everything a run needs before its first step: devices, base, tokenizer, rows."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from milora_jax.adapters.hooks import abstract_params
from milora_jax.adapters.protocol import output_mask, router_mask
from milora_jax.adapters.registry import adapter_shape, build_method, full_settings, require_fits
from milora_jax.base.attention import DeviceLayout
from milora_jax.base.fingerprint import base_fingerprint
from milora_jax.base.hf import Progress, ignore, load_leaves
from milora_jax.base.hf_config import read_model_config
from milora_jax.base.modules import Base, decode_layout
from milora_jax.base.source import model_directory
from milora_jax.config import Config
from milora_jax.data.batches import collate, padded_length
from milora_jax.data.chat import asks_for_time
from milora_jax.data.packing import Rows
from milora_jax.data.records import Record, fingerprint
from milora_jax.data.tokens import load_tokenizer
from milora_jax.errors import require
from milora_jax.model_config import ModelConfig
from milora_jax.parallel.mesh import check_meshes, eval_mesh, make_mesh
from milora_jax.parallel.processes import from_first, own_rows, package_versions, place, require_same
from milora_jax.parallel.rules import base_sharding, batch_sharding, layout_over, relaid, with_layout
from milora_jax.storage.workdir import CONFIG_NAME
from milora_jax.training.optim import NO_RATIO
from milora_jax.training.rows import encode_rows, read_rows
from milora_jax.training.start import starting_params
from milora_jax.training.trackers import require_installed
from milora_jax.training.workdir import continued, refuse_early
from milora_jax.types import Batch

ROW_MULTIPLE = 8
"""The common length of training rows is a multiple of this."""


@dataclass(frozen=True)
class Run:
    """A run that is ready to train.

    Attributes:
      config: the config, with every setting of the method written out.
      model, base: the frozen model, its leaves laid out over ``mesh``.
      train, dev: encoded records row by row, one in a row unless ``data.pack`` packs several.
      tests: records to score, by task name.
      data_fingerprint: SHA-256 over the training and dev records, and their chat template.
      token_fingerprint: SHA-256 over the token ids of the training and dev rows.
      base_fingerprint: fingerprint of the model directory, see ``base.fingerprint``.
      dev_tests: dev records to answer at every dev evaluation, by source; empty unless ``train.best_by`` asks
        for it.
    """

    config: Config
    model: ModelConfig
    base: Base
    tokenizer: Any
    mesh: Mesh
    train: Rows
    dev: Rows
    tests: dict[str, list[Record]]
    data_fingerprint: str
    token_fingerprint: str
    base_fingerprint: str
    dev_tests: dict[str, list[Record]] = field(default_factory=dict)

    @property
    def prompts(self) -> int:
        """Z, the largest number of prompts in a row."""
        return max(self.train.prompts, self.dev.prompts)

    @property
    def measure(self) -> str:
        """Name of the loss on dev rows, which tells whether a run learns."""
        return "dev loss" if self.config.train.prefers else "dev perplexity"

    @property
    def guess(self) -> int | float:
        """That figure of the uniform guess; infinite where it says nothing."""
        return math.inf if self.config.train.prefers else self.model.vocab_size

    @functools.cached_property
    def row_length(self) -> int:
        """T, the length to which every row is padded, so that one step is compiled."""
        longest = int(max(self.train.lengths.max(), self.dev.lengths.max()))
        return padded_length(longest, ROW_MULTIPLE, self.train.answers * self.config.data.max_length)

    @property
    def eval_mesh(self) -> Mesh:
        """The mesh of the scoring."""
        return eval_mesh(self.mesh, self.config)

    @property
    def layout(self) -> DeviceLayout | None:
        """How rows and heads are divided when answers are scored; None on one device."""
        return layout_over(self.eval_mesh)

    def decoding_base(self) -> Base:
        """The base in the layout for decoding, over the mesh of the scoring."""
        mesh = self.eval_mesh
        return decode_layout(self.base) if mesh.size == 1 else relaid(self.base, mesh)

    def batch(self, rows: Rows, numbers: Sequence[int] | np.ndarray) -> Batch:
        """A batch of training on the devices, split by rows; a host reads those of its own devices only.

        Args:
          rows: ``train`` or ``dev``.
          numbers: which of them, at most ``train.batch_size``.
        """
        size = self.config.train.batch_size
        own = own_rows(batch_sharding(self.mesh), size)
        packed = [rows[number] if i in own else [] for i, number in enumerate(numbers)]
        return self.place(collate(packed, self.row_length, size, self.prompts, self.train.answers))

    def place(self, batch: Batch) -> Batch:
        """Put a host batch on the devices, split by rows."""
        return place(batch, batch_sharding(self.mesh))


def prepare_run(
    config: Config, workdir: Path | None, log: Callable[[str], None], progress: Progress = ignore
) -> Run:
    """Read the rows, the tokenizer and the base of a config; write nothing.

    Rows are read first: a typo in a file name should not cost the minutes that a 7B base takes to load.

    Args:
      workdir: where the run will write; refused here if another run is in it. None where the caller holds its
        lock already.
      log: receives one line for each noteworthy fact (rows dropped, held out, loaded).
      progress: called with the bytes of the base read so far and their total.

    Raises:
      UserError: something is wrong with a setting or a file, or differs from that of another process.
    """
    require_same(lambda: {**package_versions(), **config.to_dict()})
    config = continued(config, workdir, log)
    method = build_method(config.adapter)
    config = dataclasses.replace(config, adapter=full_settings(method))
    _ = config.prompt_format  # checks that what the routers read is there
    require(bool(config.model.path), "model.path", config.model.path, "a Hugging Face directory")
    require(bool(config.data.train), "data.train", config.data.train, "at least one file")
    require_installed(config.train.trackers)
    directory = model_directory(config.model.path)
    model = read_model_config(directory)
    require_fits(method, model)
    rate, params = config.train.router_rate, abstract_params(method, adapter_shape(model))
    has_router = any(jax.tree.leaves(router_mask(method, params)))
    require(rate == 1 or has_router, "train.router_rate", rate, f"1, method {method.name!r} has no router")
    noise, apart = config.train.neftune_alpha, method.routes or not has_router
    expected = f"0, the routers of method {method.name!r} read every token, and noise must not reach them"
    require(noise == 0 or apart, "train.neftune_alpha", noise, expected)
    ratio, has_pairs = config.train.lora_plus_ratio, any(jax.tree.leaves(output_mask(method, params)))
    alike = ratio in NO_RATIO or has_pairs
    require(
        alike, "train.lora_plus_ratio", ratio, f"0 or 1, method {method.name!r} has no B that starts at 0"
    )
    require(
        config.data.max_length <= model.max_positions,
        "data.max_length",
        config.data.max_length,
        f"at most the model's {model.max_positions} positions",
    )
    require(bool(model.eos_ids), "eos_token_id of the model", None, "a token that ends an answer")
    if workdir is not None:
        refuse_early(workdir, config)
    started = workdir is not None and (workdir / "checkpoints").is_dir()
    if config.train.init_from and (config.train.prefers or not started):
        starting_params(config.train.init_from, method, adapter_shape(model), directory)
    mesh = make_mesh(config.mesh)
    check_meshes(mesh, config, model)
    read = read_rows(config)
    tokenizer = load_tokenizer(str(directory))
    if workdir is None or not (workdir / CONFIG_NAME).is_file():
        config = _with_time(config, tokenizer)
    rows = encode_rows(read, tokenizer, config, model, log)
    of_base = base_fingerprint(directory)
    require_same(
        lambda: {
            "the fingerprint of the training and dev rows": rows["data_fingerprint"],
            "the fingerprint of the tokens of the training and dev rows": rows["token_fingerprint"],
            **{
                f"the fingerprint of the rows of test task {task!r}": fingerprint(records)
                for task, records in read.tests.items()
            },
            "the fingerprint of the files of the base": of_base,
        }
    )
    base = load_leaves(
        directory,
        model,
        config.model.dtype,
        lambda path: base_sharding(mesh, path),
        quantize=config.model.quantize,
        progress=progress,
    )
    return Run(
        config=config,
        model=model,
        base=with_layout(base, mesh),
        tokenizer=tokenizer,
        mesh=mesh,
        base_fingerprint=of_base,
        **rows,
    )


def with_rows(run: Run, config: Config, log: Callable[[str], None]) -> Run:
    """Replace the rows and settings of a run by those of ``config``; base, tokenizer and devices stay.

    Args:
      config: a config with the model and mesh of ``run.config``.
    """
    rows = encode_rows(read_rows(config), run.tokenizer, config, run.model, log)
    return dataclasses.replace(run, config=config, **rows)


def _with_time(config: Config, tokenizer: Any) -> Config:
    """Set the time of the chat template, if the template uses it and the config gives none: now, in UTC.

    With the time of each rendering instead, two runs of one seed would differ, and routes from day to day.
    """
    if config.data.template != "chat" or config.data.template_time or not asks_for_time(tokenizer):
        return config
    now = datetime.fromtimestamp(from_first(int(time.time())), UTC).replace(tzinfo=None)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, template_time=now.isoformat()))
