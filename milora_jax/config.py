"""Every setting of a run as frozen dataclasses, checked when they are made.

A file in ``configs/`` returns ``to_config_dict(Config(...))``; ``train.py`` reads the flags into
that ConfigDict and turns it back with ``Config.from_dict``, so library users never need flags.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from dataclasses import dataclass, field
from typing import Any

from milora_jax.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")
METHODS = ("milora", "lora")
POOLERS = ("attention", "mean", "max", "last")
ACTIVATIONS = ("rational", "gelu", "relu", "relu-gelu", "gelu-relu")
GATES = ("softmax", "renormalized", "straight_through")
COEFFICIENTS = ("bilevel", "joint", "frozen")


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise one clear line unless ``condition`` holds."""
    if not condition:
        raise UserError(f"{name} is {value!r}: expected {expected}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    require(value in allowed, name, value, f"one of {', '.join(allowed)}{hint}")


@dataclass(frozen=True)
class Llama3Scaling:
    """Frequency scaling of LLaMA 3.1 and later (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a frozen LLaMA-architecture Transformer.

    Sizes follow the legend of ``milora_jax.types``: hidden_size D, intermediate_size F, num_heads
    N, num_kv_heads K, head_dim H, num_layers L, vocab_size V.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    eos_ids: tuple[int, ...]
    rope_scaling: Llama3Scaling | None = None
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        sizes = "vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads head_dim"
        for name in [*sizes.split(), "max_positions"]:
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            self.num_kv_heads,
            f"a divisor of num_heads {self.num_heads}",
        )
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number (rotary halves)")
        require(self.norm_eps > 0, "norm_eps", self.norm_eps, "above 0")
        require(self.rope_theta > 0, "rope_theta", self.rope_theta, "above 0")

    @property
    def module_dims(self) -> dict[str, tuple[int, int]]:
        """Input and output width of each of the seven linear modules, from head_dim, never D."""
        d, f = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q": (d, q),
            "k": (d, kv),
            "v": (d, kv),
            "o": (q, d),
            "gate": (d, f),
            "up": (d, f),
            "down": (f, d),
        }


LLAMA2_7B = ModelConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_positions=4096,
    eos_ids=(2,),
)
"""LLaMA-2 7B, the paper's main backbone."""


@dataclass(frozen=True)
class ModelSection:
    """Where the frozen base lies and the dtype it is kept and computed in."""

    path: str = ""
    dtype: str = "float32"

    def __post_init__(self) -> None:
        _one_of("model.dtype", self.dtype, DTYPES)


@dataclass(frozen=True)
class AdapterSection:
    """The fine-tuning method and its settings; see ``docs/method.md`` for each choice.

    Attributes:
      method: one of METHODS.
      rank: width R of every low-rank pair.
      alpha: scale numerator; an expert's output is multiplied by ``alpha / rank``. 0 means alpha =
        rank, scale 1, as Eq. 1 of the paper has no scale.
      dropout: share of the adapter's inputs dropped while training.
      top_k: experts a prompt activates per layer, k of 7.
      pooler: how a prompt's hidden states become one vector (section 3.3 of the paper).
      activation: the router's activation; ``relu-gelu`` is ReLU in the first half of the layers.
      normalize: RMS-normalise the pooled vector before the activation.
      gate: how a route weighs its chosen experts.
      load_balance: lambda, the weight of Eq. 4.
      coefficients: how the rational coefficients are trained (Appendix A).
    """

    method: str = "milora"
    rank: int = 32
    alpha: float = 0.0
    dropout: float = 0.0
    top_k: int = 3
    pooler: str = "attention"
    activation: str = "rational"
    normalize: bool = True
    gate: str = "straight_through"
    load_balance: float = 1e-2
    coefficients: str = "bilevel"

    def __post_init__(self) -> None:
        _one_of("adapter.method", self.method, METHODS)
        _one_of("adapter.pooler", self.pooler, POOLERS)
        _one_of("adapter.activation", self.activation, ACTIVATIONS)
        _one_of("adapter.gate", self.gate, GATES)
        _one_of("adapter.coefficients", self.coefficients, COEFFICIENTS)
        require(self.rank >= 1, "adapter.rank", self.rank, "at least 1")
        require(
            math.isfinite(self.alpha) and self.alpha >= 0,
            "adapter.alpha",
            self.alpha,
            "0 (alpha = rank) or more",
        )
        require(0 <= self.dropout < 1, "adapter.dropout", self.dropout, "from 0 to below 1")
        require(1 <= self.top_k <= 7, "adapter.top_k", self.top_k, "1 to 7, a layer has 7 experts")
        require(
            math.isfinite(self.load_balance) and self.load_balance >= 0,
            "adapter.load_balance",
            self.load_balance,
            "0 or more",
        )

    @property
    def scale(self) -> float:
        """What a low-rank product is multiplied by."""
        return self.alpha / self.rank if self.alpha else 1.0


@dataclass(frozen=True)
class DataSection:
    """Where the records come from.

    Attributes:
      train, dev, test: files or Hub data sets, comma-separated, each ``[NAME=]SOURCE``; see
        ``milora_jax.data.records``. Every entry of ``test`` is one task of the final table.
      dev_share: share of the training rows held out as dev rows when ``dev`` is empty.
      max_length: longest row in tokens, prompt and response together.
    """

    train: str = ""
    dev: str = ""
    test: str = ""
    dev_share: float = 0.05
    max_length: int = 768

    def __post_init__(self) -> None:
        require(self.max_length >= 8, "data.max_length", self.max_length, "at least 8 tokens")
        require(0 < self.dev_share < 1, "data.dev_share", self.dev_share, "between 0 and 1")


@dataclass(frozen=True)
class TrainSection:
    """The optimiser and the schedule of a run, in optimiser steps.

    Attributes:
      max_steps: stop after so many steps; 0 means as many as ``epochs`` gives.
      epochs: passes over the training rows; with ``max_steps`` the shorter of both holds.
      batch_size: rows of a step, over all devices together.
      learning_rate: peak, reached after the warm-up and then falling linearly to 0.
      coefficient_learning_rate: the same for the rational coefficients (paper: 1e-6).
      coefficient_every: steps between two bi-level updates on a dev batch (paper: 1).
      warmup_share: share of all steps spent warming up.
      weight_decay: decoupled weight decay of AdamW.
      clip_norm: largest global gradient norm; 0 switches clipping off.
      eval_every: steps between two dev perplexities.
      save_every: steps between two checkpoints.
      log_every: steps between two lines of ``metrics.jsonl``.
      patience: dev evaluations without improvement before the run stops early; 0 never stops.
      max_bad_steps: non-finite steps in a row that stop the run.
      seed: seed of initialisation, row order and dropout.
    """

    max_steps: int = 0
    epochs: int = 10
    batch_size: int = 16
    learning_rate: float = 1e-4
    coefficient_learning_rate: float = 1e-6
    coefficient_every: int = 1
    warmup_share: float = 0.06
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    eval_every: int = 200
    save_every: int = 200
    log_every: int = 10
    patience: int = 10
    max_bad_steps: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for (
            name
        ) in "epochs batch_size coefficient_every eval_every save_every log_every max_bad_steps".split():
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        for name in "max_steps patience seed".split():
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 or more")
        require(self.seed < 2**32, "train.seed", self.seed, "below 2**32")
        for name in "learning_rate coefficient_learning_rate weight_decay clip_norm".split():
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, f"train.{name}", value, "0 or more")
        require(0 <= self.warmup_share < 1, "train.warmup_share", self.warmup_share, "from 0 to below 1")


@dataclass(frozen=True)
class MeshSection:
    """Devices along each axis of the mesh; -1 on one axis means all that remain."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        for name, size in zip(("data", "fsdp", "tensor"), sizes, strict=True):
            require(size >= 1 or size == -1, f"mesh.{name}", size, "at least 1, or -1 for the rest")
        require(sizes.count(-1) <= 1, "mesh", sizes, "at most one -1")


@dataclass(frozen=True)
class EvalSection:
    """The evaluation after training.

    Attributes:
      limit: rows scored per task; 0 means all.
      batch_size: prompts decoded together.
      max_new_tokens: longest answer in tokens.
    """

    limit: int = 0
    batch_size: int = 32
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        require(self.limit >= 0, "eval.limit", self.limit, "0 or more")
        require(self.batch_size >= 1, "eval.batch_size", self.batch_size, "at least 1")
        require(self.max_new_tokens >= 1, "eval.max_new_tokens", self.max_new_tokens, "at least 1")


@dataclass(frozen=True)
class Config:
    """A whole run: what ``config.json`` in the workdir holds."""

    model: ModelSection = field(default_factory=ModelSection)
    adapter: AdapterSection = field(default_factory=AdapterSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    mesh: MeshSection = field(default_factory=MeshSection)
    eval: EvalSection = field(default_factory=EvalSection)

    @classmethod
    def from_dict(cls, values: Any) -> Config:
        """Build and check a Config from nested mappings; unknown or ill-typed fields raise UserError."""
        return _from_dict(cls, values, "config")

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries, ready for JSON."""
        return dataclasses.asdict(self)


def to_config_dict(config: Config) -> Any:
    """The ``ml_collections.ConfigDict`` of a Config, whose fields flags may override."""
    import ml_collections  # only config files and train.py need it

    return ml_collections.ConfigDict(config.to_dict())


def _from_dict(cls: Any, values: Any, where: str) -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    for name in values:
        near = difflib.get_close_matches(str(name), sorted(known), n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else f" (known: {', '.join(sorted(known))})"
        if name not in known:
            raise UserError(f"unknown setting {where}.{name}{hint}")
    types = typing.get_type_hints(cls)
    parsed = {}
    for name in known & set(values):
        value, kind = values[name], types[name]
        label = f"{where}.{name}"
        if dataclasses.is_dataclass(kind):
            parsed[name] = _from_dict(kind, value, label)
        elif kind is float and isinstance(value, int) and not isinstance(value, bool):
            parsed[name] = float(value)
        else:
            require(type(value) is kind, label, value, f"a value of type {kind.__name__}")
            parsed[name] = value
    return cls(**parsed)
