"""The shape and the constants of a frozen base, in which the model families differ."""

from __future__ import annotations

from dataclasses import dataclass

from milora_jax.errors import one_of, require
from milora_jax.types import EXPERTS, GROUPS

GATE_ACTIVATIONS = ("silu", "gelu_tanh")
"""Activations of the gate; ``gelu_tanh`` is GELU in its approximation by tanh."""


@dataclass(frozen=True)
class Llama3Scaling:
    """Frequency scaling of LLaMA 3.1 and later (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class LinearScaling:
    """All frequencies divided by one factor (``rope_type: linear``), as in Gemma 3 from 4B on."""

    factor: float


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a frozen Transformer.

    Sizes follow the legend of ``milora_jax.types``: hidden_size D, intermediate_size F, num_heads
    N, num_kv_heads K, head_dim H, num_layers L, vocab_size V.

    Attributes:
      norm_eps: added to the mean square in every norm.
      rope_theta: base wavelength of the rotary embedding.
      max_positions: longest row the model was made for.
      eos_ids: tokens that end a text.
      rope_scaling: scaling of the rotary frequencies.
      tie_embeddings: whether the head is the embedding.
      biased: modules that have a bias.
      activation: activation of the gate, one of :data:`GATE_ACTIVATIONS`.
      norm_unit_offset: norms multiply by ``1 + weight``, in float32 (Gemma).
      post_norms: a norm behind each sublayer as well, before it is added to the stream (Gemma 2 and 3).
      qk_norm: a norm over every head of queries and keys before the rotary embedding (Qwen3, Gemma 3).
      qk_norm_all_heads: that norm is over all heads together instead, N H and K H wide (OLMoE).
      scale_embedding: the stream starts at ``sqrt(D)`` times the embedding (Gemma).
      query_scalar: scores are divided by its square root; None is H.
      attention_softcap: a score becomes ``c tanh(score / c)``; None leaves it.
      final_softcap: the same for the logits.
      sliding_window: in the layers that slide, a query sees so many tokens, itself included; None for all.
      sliding_pattern: which layers slide, from the first on, repeated as often as there are layers.
      local_rope_theta: base wavelength, unscaled, in the layers that slide; None is that of the others.
      num_experts: X, the feed-forward experts of every layer, each ``intermediate_size`` wide; 0 for a dense
        base.
      experts_per_token: C, the experts through which a token goes.
      norm_topk_prob: divide the probabilities of a token's experts by their sum.
      family: which tensors and keys the files have, one of ``base.families.FAMILIES``.
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
    rope_scaling: Llama3Scaling | LinearScaling | None = None
    tie_embeddings: bool = False
    biased: tuple[str, ...] = ()
    activation: str = "silu"
    norm_unit_offset: bool = False
    post_norms: bool = False
    qk_norm: bool = False
    qk_norm_all_heads: bool = False
    scale_embedding: bool = False
    query_scalar: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    sliding_window: int | None = None
    sliding_pattern: tuple[bool, ...] = (False,)
    local_rope_theta: float | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    norm_topk_prob: bool = False
    family: str = "llama"

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
        one_of("activation", self.activation, GATE_ACTIVATIONS)
        whole = all(len({name in self.biased for name in names}) == 1 for names in GROUPS)
        require(whole, "biased", self.biased, "all or none of the modules that share an input")
        for name in ("query_scalar", "attention_softcap", "final_softcap", "sliding_window"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "above 0, or none")
        require(len(self.sliding_pattern) >= 1, "sliding_pattern", self.sliding_pattern, "at least one layer")
        require(self.num_experts >= 0, "num_experts", self.num_experts, "at least 0")
        least = min(1, self.num_experts)
        fits = least <= self.experts_per_token <= self.num_experts
        expected = f"{least} to num_experts {self.num_experts}"
        require(fits, "experts_per_token", self.experts_per_token, expected)
        plain = not (self.num_experts and set(self.biased) & {"gate", "up", "down"})
        require(plain, "biased", self.biased, "no bias in the experts")

    @property
    def slides(self) -> tuple[bool, ...]:
        """Whether each layer slides."""
        if self.sliding_window is None:
            return (False,) * self.num_layers
        pattern = self.sliding_pattern
        return tuple(pattern[i % len(pattern)] for i in range(self.num_layers))

    @property
    def score_scale(self) -> float:
        """The factor of the product of a query and a key."""
        return (self.head_dim if self.query_scalar is None else self.query_scalar) ** -0.5

    @property
    def module_dims(self) -> dict[str, tuple[int, int]]:
        """Input and output width of each of the seven linear modules, from head_dim, never D; of one expert
        in a base with experts.
        """
        d, f = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        widths = ((d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d))
        return dict(zip(EXPERTS, widths, strict=True))

    @property
    def matrix_parameters(self) -> int:
        """N: the parameters that every token is multiplied by; the embedding look-up is not counted.

        Of the experts of a base these are the chosen ones, and their router.
        """
        return self._matrices(self.experts_per_token)

    @property
    def total_parameters(self) -> int:
        """The parameters in all matrices, with every expert; those of :attr:`matrix_parameters` in a dense
        base.
        """
        return self._matrices(self.num_experts)

    def _matrices(self, experts: int) -> int:
        sizes = {name: d_in * d_out for name, (d_in, d_out) in self.module_dims.items()}
        feedforward = sum(sizes[name] for name in ("gate", "up", "down"))
        layer = sum(sizes.values())
        if self.num_experts:
            layer += (experts - 1) * feedforward + self.hidden_size * self.num_experts
        return self.num_layers * layer + self.vocab_size * self.hidden_size


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
