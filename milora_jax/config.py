"""Every setting of a run as frozen dataclasses, which check their values when they are made.

A file in ``configs/`` returns ``to_config_dict(Config(...))``; a command line sets options in it and converts
it back with ``Config.from_dict``.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from milora_jax.columns import parse_columns
from milora_jax.errors import UserError, one_of, require
from milora_jax.prompt_format import SPECIAL_TOKENS, TEMPLATES, PromptFormat

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZE = ("none", "int8", "nf4")
POOLERS = ("attention", "mean", "max", "last")
ACTIVATIONS = ("rational", "gelu", "relu", "relu-gelu", "gelu-relu")
FEATURES = ("raw", "rms", "standardized")
GATES = ("softmax", "renormalized", "straight_through")
ROUTER_GRADIENTS = ("chosen", "dense")
BALANCES = ("loss", "bias")
COEFFICIENTS = ("bilevel", "joint", "frozen")
TRACKERS = ("tensorboard", "wandb")
REMAT = ("none", "products", "full")
"""What a backward pass computes again, from the least to the most; see :class:`TrainSection`."""


@dataclass(frozen=True)
class ModelSection:
    """The frozen base: where it is and how it is stored in memory.

    Attributes:
      path: a Hugging Face directory, ``hf://OWNER/NAME[@REVISION]`` of the Hub, or ``gs://BUCKET/PATH``.
      dtype: dtype of its computation, and of its weights where they are not quantised.
      quantize: how the matrices of its layers are stored: none; int8, a scale per output; nf4, 4 bits and a
        scale per 64 inputs.
    """

    path: str = ""
    dtype: str = "float32"
    quantize: str = "none"

    def __post_init__(self) -> None:
        one_of("model.dtype", self.dtype, DTYPES)
        one_of("model.quantize", self.quantize, QUANTIZE)


@dataclass(frozen=True)
class AdapterSection:
    """The fine-tuning method and its settings.

    None takes the method's own default. The class of a method under ``milora_jax/adapters/`` documents its
    settings and their defaults; a setting that the method does not have is refused. Brackets name the methods
    that read a setting, where not all methods of a kind do:

    Attributes:
      method: the fine-tuning method, a name of ``adapters.registry``, which checks it.
      rank, alpha, dropout: of low-rank pairs. [all made of them]
      route_on: what of the prompt the routers read. [milora, midora]
      top_k, pooler, activation, features, gate: the router. [milora, midora; moelora has top_k]
      feature_window, router_gradient, top_k_anneal: how the router is trained. [milora, midora]
      balance, load_balance, balance_warmup, balance_until, balance_decay, bias_rate: the balancing of the
        experts. [milora, midora]
      normalize: the former name of ``features``: true is rms, false is raw. [milora, midora]
      coefficients: how rational coefficients or gates are trained (Appendix A). [milora, midora,
        learned_adapter, iapt, ssp]
      num_experts: experts within a module. [moelora]
      initial_rank, orthogonality, prune_start, prune_end, prune_every, sensitivity_decay, spread_decay:
        the pruning of ranks. [adalora]
      width: width of a bottleneck or of a vector that is projected. [ia3, bitfit, parallel_adapter,
        learned_adapter, p_tuning_v2, iapt]
      tokens: length of a prefix. [p_tuning_v2, iapt]
      search_share, gate_learning_rate: the search for a structure. [ssp]
    """

    method: str = "milora"
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    route_on: str | None = None
    top_k: int | None = None
    pooler: str | None = None
    activation: str | None = None
    features: str | None = None
    feature_window: float | None = None
    gate: str | None = None
    router_gradient: str | None = None
    top_k_anneal: float | None = None
    balance: str | None = None
    load_balance: float | None = None
    balance_warmup: float | None = None
    balance_until: float | None = None
    balance_decay: float | None = None
    bias_rate: float | None = None
    normalize: bool | None = None
    coefficients: str | None = None
    num_experts: int | None = None
    initial_rank: int | None = None
    orthogonality: float | None = None
    prune_start: float | None = None
    prune_end: float | None = None
    prune_every: int | None = None
    sensitivity_decay: float | None = None
    spread_decay: float | None = None
    width: int | None = None
    tokens: int | None = None
    search_share: float | None = None
    gate_learning_rate: float | None = None

    def __post_init__(self) -> None:
        if self.normalize is not None:
            means = "rms" if self.normalize else "raw"
            same = self.features in (None, means)
            require(same, "adapter.features", self.features, f"{means}, which adapter.normalize means")
            object.__setattr__(self, "features", means)
            object.__setattr__(self, "normalize", None)


@dataclass(frozen=True)
class DataSection:
    """The data sets of a run and the form of their prompts.

    Attributes:
      train: files or Hub data sets, comma-separated, each ``[NAME=]SOURCE``; see
        ``milora_jax.data.records``.
      dev: as ``train``; where it is empty, ``dev_share`` of the training rows is used.
      test: as ``train``; every entry is one task of the final table.
      columns: which column of the rows holds which field: comma-separated ``[SOURCE:]FIELD=COLUMN``,
        ``FIELD="a text"`` for the same text in every row, or ``COLUMN=`` to leave a column out; see
        docs/data.md.
      dev_share: share of the training rows held out as dev rows when ``dev`` is empty.
      dev_limit: most dev rows, for quick evaluations: the first rows of every entry of ``dev``, or the number
        of rows held out; 0 means no limit.
      template: form of a prompt: alpaca, see ``milora_jax.data.prompts``; chat, the tokenizer's own template,
        see ``milora_jax.data.chat``.
      special_tokens: special tokens around a prompt of the ``alpaca`` template and around plain texts:
        tokenizer, those of ``tokenizer(text)``; bos, one beginning-of-sequence token before it; none.
      template_time: the time that a chat template gets from ``strftime_now``, as in 2026-11-29T12:00:00;
        empty is the time at which the run begins. It is stored with the adapter.
      max_length: longest row in tokens, prompt and response together.
      pack: put several training records into a row of ``max_length`` tokens; each has its own attention,
        positions, loss and route.
      prepared_path: directory that keeps the tokenised training and dev rows in files, as Axolotl's
        ``dataset_prepared_path``; later starts read them there, row by row, and hold none in memory. Empty
        keeps all rows in memory. See docs/data.md.
    """

    train: str = ""
    dev: str = ""
    test: str = ""
    columns: str = ""
    dev_share: float = 0.05
    dev_limit: int = 0
    template: str = "alpaca"
    special_tokens: str = "tokenizer"
    template_time: str = ""
    max_length: int = 768
    pack: bool = False
    prepared_path: str = ""

    def __post_init__(self) -> None:
        parse_columns(self.columns)
        one_of("data.template", self.template, TEMPLATES)
        one_of("data.special_tokens", self.special_tokens, SPECIAL_TOKENS)
        _ = self.prompt_format  # checks the time
        require(self.max_length >= 8, "data.max_length", self.max_length, "at least 8 tokens")
        require(0 < self.dev_share < 1, "data.dev_share", self.dev_share, "between 0 and 1")
        require(self.dev_limit >= 0, "data.dev_limit", self.dev_limit, "0 or more")
        local = "://" not in self.prepared_path
        require(local, "data.prepared_path", self.prepared_path, "a directory of this machine or its network")

    @property
    def prompt_format(self) -> PromptFormat:
        """How prompts are written; ``Config.prompt_format`` adds what of them the routers read."""
        return PromptFormat(self.template, self.special_tokens, self.template_time)


@dataclass(frozen=True)
class TrainSection:
    """The optimiser and the schedule of a run, in optimiser steps.

    Attributes:
      max_steps: number of optimiser steps; 0 means as many as ``epochs`` gives.
      epochs: passes over the training rows; with ``max_steps`` too the run ends at the earlier of both.
      batch_size: rows of a step, over all devices together; a packed row holds several records.
      learning_rate: peak learning rate, reached after the warm-up; it then falls linearly to 0.
      router_rate: learning rate of the routers' parameters as a multiple of ``learning_rate``.
      router_clip_norm: largest norm of the routers' gradient, which is then clipped apart from that of the
        experts; 0 clips both together, by ``clip_norm``.
      feature_prompts: training prompts on which the statistics of standardized features are measured.
      coefficient_learning_rate: learning rate of the rational coefficients (paper: 1e-6).
      coefficient_every: steps between two bi-level updates of Theta, each on a dev batch (paper: 1). An
        update costs about as much as a step: 1 doubles the cost of training, 10 adds a tenth.
      warmup_share: share of all steps spent warming up.
      accumulate: parts into which a step's rows are divided and that are computed one after the other, which
        saves memory; the update is that of all rows together.
      remat: what the backward pass computes again instead of keeping it: none, nothing; products, all but
        the results of matrix products; full, every layer from its input. Attention's scores are never kept.
      loss_chunk: tokens of the batch whose logits are in memory at a time.
      weight_decay: decoupled weight decay of AdamW.
      clip_norm: largest global gradient norm; 0 switches clipping off.
      eval_every: steps between two dev perplexities.
      save_every: steps between two checkpoints.
      log_every: steps between two lines of ``metrics.jsonl``.
      patience: dev evaluations without improvement before the run stops early; 0 never stops.
      max_bad_steps: non-finite steps in a row that stop the run.
      seed: seed of initialisation, row order and dropout.
      trackers: where metrics go beside ``metrics.jsonl``: tensorboard, wandb, or both, comma-separated; see
        docs/logging.md.
      init_from: a workdir or an exported or imported adapter, of the same method and base, whose parameters
        training starts from; empty starts from fresh ones.
    """

    max_steps: int = 0
    epochs: int = 10
    batch_size: int = 16
    learning_rate: float = 1e-4
    router_rate: float = 1.0
    router_clip_norm: float = 0.0
    feature_prompts: int = 256
    coefficient_learning_rate: float = 1e-6
    coefficient_every: int = 1
    warmup_share: float = 0.06
    accumulate: int = 1
    remat: str = "products"
    loss_chunk: int = 4096
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    eval_every: int = 200
    save_every: int = 200
    log_every: int = 10
    patience: int = 10
    max_bad_steps: int = 5
    seed: int = 0
    trackers: str = ""
    init_from: str = ""

    def __post_init__(self) -> None:
        counts = "epochs batch_size accumulate loss_chunk coefficient_every eval_every save_every log_every"
        for name in [*counts.split(), "max_bad_steps"]:
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        for name in "max_steps patience seed".split():
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 or more")
        one_of("train.remat", self.remat, REMAT)
        for name in tracker_names(self.trackers):
            one_of("train.trackers", name, TRACKERS)
        require(self.seed < 2**32, "train.seed", self.seed, "below 2**32")
        require(self.feature_prompts >= 2, "train.feature_prompts", self.feature_prompts, "at least 2")
        rates = "learning_rate router_rate router_clip_norm coefficient_learning_rate weight_decay clip_norm"
        for name in rates.split():
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, f"train.{name}", value, "0 or more")
        require(0 <= self.warmup_share < 1, "train.warmup_share", self.warmup_share, "from 0 to below 1")


def tracker_names(trackers: str) -> tuple[str, ...]:
    """The names in ``train.trackers``, each once.

    >>> tracker_names("wandb, tensorboard,wandb")
    ('wandb', 'tensorboard')
    """
    return tuple(dict.fromkeys(filter(None, (part.strip() for part in trackers.split(",")))))


@dataclass(frozen=True)
class MeshSection:
    """Devices along each axis of the mesh; -1 on one axis means all that remain.

    Attributes:
      data: devices that divide the rows of a step among them, each with the whole base; -1, on any one axis,
        means all that remain.
      fsdp: devices that divide the rows, and the base as well.
      tensor: devices that divide the work of every layer among them.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        for name, size in zip(("data", "fsdp", "tensor"), sizes, strict=True):
            require(size >= 1 or size == -1, f"mesh.{name}", size, "at least 1, or -1 for the rest")
        require(sizes.count(-1) <= 1, "mesh", sizes, "at most one -1")


def parse_mesh(text: str, name: str = "--mesh") -> MeshSection:
    """Parse ``data=1,fsdp=16,tensor=1``; an axis that is not named is 1.

    >>> parse_mesh("fsdp=4,tensor=2")
    MeshSection(data=1, fsdp=4, tensor=2)
    """
    sizes = {"data": 1, "fsdp": 1, "tensor": 1}
    for entry in text.split(","):
        axis, _, size = entry.strip().partition("=")
        number = size.removeprefix("-").isdecimal()
        require(axis in sizes and number, name, text, "such as data=1,fsdp=16,tensor=1")
        sizes[axis] = int(size)
    return MeshSection(**sizes)


@dataclass(frozen=True)
class EvalSection:
    """The evaluation after training.

    Attributes:
      limit: rows scored per task; 0 means all.
      batch_size: prompts decoded together.
      max_new_tokens: longest answer in tokens.
      mesh: mesh of the scoring, such as ``tensor=8``; empty is that of training, see docs/scaling.md.
    """

    limit: int = 0
    batch_size: int = 32
    max_new_tokens: int = 64
    mesh: str = ""

    def __post_init__(self) -> None:
        if self.mesh:
            parse_mesh(self.mesh, "eval.mesh")
        require(self.limit >= 0, "eval.limit", self.limit, "0 or more")
        require(self.batch_size >= 1, "eval.batch_size", self.batch_size, "at least 1")
        require(self.max_new_tokens >= 1, "eval.max_new_tokens", self.max_new_tokens, "at least 1")


@dataclass(frozen=True)
class Config:
    """All settings of a run, as ``config.json`` in the workdir holds them."""

    model: ModelSection = field(default_factory=ModelSection)
    adapter: AdapterSection = field(default_factory=AdapterSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    mesh: MeshSection = field(default_factory=MeshSection)
    eval: EvalSection = field(default_factory=EvalSection)

    @classmethod
    def from_dict(cls, values: Any) -> Config:
        """Build and check a Config from nested mappings; an unknown or ill-typed field raises UserError."""
        return _from_dict(cls, values, "config")

    @property
    def prompt_format(self) -> PromptFormat:
        """How the prompts of the run are written, and what of them the routers read.

        Raises:
          UserError: ``adapter.route_on`` does not go together with ``data.template``.
        """
        return dataclasses.replace(self.data.prompt_format, route_on=self.adapter.route_on or "prompt")

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain nested dictionaries, ready for JSON."""
        return dataclasses.asdict(self)


def to_config_dict(config: Config) -> Any:
    """Convert to the ``ml_collections.ConfigDict`` that a file in ``configs/`` returns."""
    from ml_collections import ConfigDict  # only config files need it

    return ConfigDict(config.to_dict())


def value_type(kind: Any) -> Any:
    """``int`` of ``int | None``; any other type as it is."""
    inner = [arm for arm in typing.get_args(kind) if arm is not type(None)]
    return inner[0] if isinstance(kind, types.UnionType) else kind


def _from_dict(cls: Any, values: Any, where: str) -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    for name in values:
        near = difflib.get_close_matches(str(name), sorted(known), n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else f" (known: {', '.join(sorted(known))})"
        if name not in known:
            raise UserError(f"unknown setting {where}.{name}{hint}")
    hints = typing.get_type_hints(cls)
    parsed = {}
    for name in known & set(values):
        value, kind = values[name], value_type(hints[name])
        label = f"{where}.{name}"
        if value is None and isinstance(hints[name], types.UnionType):
            parsed[name] = None
        elif dataclasses.is_dataclass(kind):
            parsed[name] = _from_dict(kind, value, label)
        elif kind is float and isinstance(value, int) and not isinstance(value, bool):
            try:
                parsed[name] = float(value)
            except OverflowError:
                raise UserError(f"{label} has {len(str(value))} digits: expected a number") from None
        else:
            require(type(value) is kind, label, value, f"a value of type {kind.__name__}")
            parsed[name] = value
    return cls(**parsed)
