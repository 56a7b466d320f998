"""The settings of the fine-tuning methods."""

from __future__ import annotations

from dataclasses import dataclass

from milora_jax.errors import require

POOLERS = ("attention", "mean", "max", "last")
ACTIVATIONS = ("rational", "gelu", "relu", "relu-gelu", "gelu-relu")
FEATURES = ("raw", "rms", "standardized")
GATES = ("softmax", "renormalized", "straight_through")
ROUTER_GRADIENTS = ("chosen", "dense")
BALANCES = ("loss", "bias")
COEFFICIENTS = ("bilevel", "joint", "frozen")


@dataclass(frozen=True)
class AdapterSection:
    """The fine-tuning method and its settings.

    None takes the method's own default. The class of a method under ``milora_jax/adapters/`` documents its
    settings and their defaults; a setting that the method does not have is refused. Brackets name the methods
    that read a setting, where not all methods of a kind do:

    Attributes:
      method: the fine-tuning method, a name of ``adapters.registry``, which checks it.
      rank, alpha, use_rslora, dropout: of low-rank pairs. [all made of them]
      target_modules: the modules that have a pair. [lora, dora]
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
    use_rslora: bool | None = None
    dropout: float | None = None
    target_modules: str | None = None
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
