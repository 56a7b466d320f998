"""The model families: what each fixes, and which keys of ``config.json`` it reads. A table without code.

A family is a ``model_type`` of Hugging Face. Its entry says what the code behind that name does whatever the
config holds (:attr:`Family.fixed`), and the meaning of a missing key (:attr:`Family.defaults`, as in the
class in transformers). Every other difference is a value in the config, read by ``base.hf_config``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SWITCHES: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "query_pre_attn_scalar": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "rope_local_base_freq": None,
}
"""Keys that change the function, with the values that mean off. Families without a key refuse it."""

UNSUPPORTED: dict[str, Any] = {
    "quantization_config": None,
    "rope_interleaved": False,
    "use_bidirectional_attention": False,
    "partial_rotary_factor": 1.0,
    "clip_qkv": None,
    "router_jitter_noise": 0.0,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
"""Keys that ask for what no family implements, with the values that mean off."""

EXPERT_COUNTS = ("num_experts", "num_local_experts")
"""Keys of the number of experts: transformers reads and writes either. Dense families refuse both."""


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
      architecture: the class named in ``config.json``.
      fixed: fields of ``ModelConfig`` that the family's code fixes.
      switches: the keys of :data:`SWITCHES` that the family has.
      defaults: values of keys that a config may omit.
      activation_keys: keys that name the gate's activation; the first that is present and not null counts.
      gelu_is_tanh: whether "gelu" means the approximation, as in Gemma's first configs.
      slides: how layers slide where ``layer_types`` is missing: "none", "all", "late" (from
        ``max_window_layers`` on), or "every" (all but each n-th).
      every: n, unless ``sliding_window_pattern`` sets it.
      in_images: whether its files may hold a vision-language model around the language model.
      fused: whether the files hold Q, K, V in one tensor, and gate and up in another.
      expert_paths: names of an expert's modules and of the router inside a layer of the files, with ``{}``
        for the number of the expert; None for a dense family.
      expert_width: the key of the width of an expert.
    """

    architecture: str
    fixed: dict[str, Any] = field(default_factory=dict)
    switches: tuple[str, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)
    activation_keys: tuple[str, ...] = ("hidden_act",)
    gelu_is_tanh: bool = False
    slides: str = "none"
    every: int = 0
    in_images: bool = False
    fused: bool = False
    expert_paths: dict[str, str] | None = None
    expert_width: str = "intermediate_size"


_EXPERT_PATHS = {
    "router": "mlp.gate",
    **{name: f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")},
}
_GEMMA = {"norm_unit_offset": True, "scale_embedding": True}
_GEMMA_DEFAULTS = {"tie_word_embeddings": True, "head_dim": 256, "eos_token_id": 1}

FAMILIES = {
    "llama": Family("LlamaForCausalLM", switches=("attention_bias", "mlp_bias")),
    "mistral": Family(
        "MistralForCausalLM",
        switches=("sliding_window",),
        defaults={"sliding_window": 4096, "num_key_value_heads": 8},
        slides="all",
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        fixed={"biased": ("q", "k", "v")},
        switches=("sliding_window", "use_sliding_window"),
        defaults={"sliding_window": 4096, "max_window_layers": 28},
        slides="late",
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        fixed={"qk_norm": True},
        switches=("attention_bias", "sliding_window", "use_sliding_window"),
        defaults={"sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
        slides="late",
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        fixed=_GEMMA,
        switches=("attention_bias",),
        defaults={**_GEMMA_DEFAULTS, "hidden_act": "gelu_pytorch_tanh"},
        activation_keys=("hidden_activation", "hidden_act"),
        gelu_is_tanh=True,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        fixed={**_GEMMA, "post_norms": True},
        switches=(
            "attention_bias",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "query_pre_attn_scalar",
            "sliding_window",
        ),
        defaults={
            **_GEMMA_DEFAULTS,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
        },
        activation_keys=("hidden_activation",),
        slides="every",
        every=2,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        fixed={**_GEMMA, "post_norms": True, "qk_norm": True},
        switches=(
            "attention_bias",
            "final_logit_softcapping",
            "query_pre_attn_scalar",
            "sliding_window",
            "rope_local_base_freq",
        ),
        defaults={
            **_GEMMA_DEFAULTS,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        activation_keys=("hidden_activation",),
        slides="every",
        every=6,
        in_images=True,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        switches=("sliding_window",),
        defaults={"eos_token_id": 32000, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
        slides="all",
        fused=True,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        fixed={"norm_topk_prob": True},
        switches=("sliding_window",),
        defaults={
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "max_position_embeddings": 131072,
            "eos_token_id": 2,
        },
        slides="all",
        expert_paths={
            "router": "block_sparse_moe.gate",
            "gate": "block_sparse_moe.experts.{}.w1",
            "up": "block_sparse_moe.experts.{}.w3",
            "down": "block_sparse_moe.experts.{}.w2",
        },
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        fixed={"qk_norm": True},
        switches=("attention_bias", "sliding_window", "use_sliding_window"),
        defaults={
            "sliding_window": 4096,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "max_position_embeddings": 32768,
        },
        slides="all",
        expert_paths=_EXPERT_PATHS,
        expert_width="moe_intermediate_size",
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        fixed={"qk_norm": True, "qk_norm_all_heads": True},
        switches=("attention_bias",),
        defaults={
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "eos_token_id": 50279,
        },
        expert_paths=_EXPERT_PATHS,
    ),
}
"""The families by ``model_type``: LLaMA 1 to 3.3, Mistral, Qwen2 to 3, Gemma 1 to 3 (text), Phi-3, and with
experts Mixtral, Qwen3-MoE and OLMoE."""
