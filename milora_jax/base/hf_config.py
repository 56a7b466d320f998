"""``config.json`` of a Hugging Face directory to and from ``ModelConfig``.

Only what we implement is accepted: a key that asks for something else is refused by name, because a
model that loads and computes the wrong function is worse than one that does not load.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from milora_jax.base.hf import read_json_object
from milora_jax.config import Llama3Scaling, ModelConfig, require
from milora_jax.errors import UserError

LARGEST = 1e30
"""No constant of a model is larger; JSON numbers may be infinite or have hundreds of digits."""

REFUSED = {
    "sliding_window": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "quantization_config": None,
    "rope_interleaved": False,
}
"""Keys that change the function and that this family does not have, with the value that means off."""


def read_model_config(directory: Path) -> ModelConfig:
    """Read and check ``config.json`` of a LLaMA-architecture model.

    Both spellings of the rotary settings are read: ``rope_theta`` with ``rope_scaling``, and
    ``rope_parameters`` as transformers 5 writes it.

    Raises:
      UserError: for a missing or ill-typed key, another architecture, or an unsupported feature.
    """
    if not directory.is_dir():
        raise UserError(f"model.path {str(directory)!r}: no such directory, expected a Hugging Face model")
    path = directory / "config.json"
    values = read_json_object(path)
    if values.get("model_type") != "llama":
        raise UserError(f"{path}: model_type is {values.get('model_type')!r}: expected 'llama'")
    for name, off in REFUSED.items():
        require(
            values.get(name, off) in (off, None), f"{path}: {name}", values.get(name), "unset: not supported"
        )
    require(
        values.get("hidden_act", "silu") == "silu", f"{path}: hidden_act", values.get("hidden_act"), "'silu'"
    )
    heads = _integer(values, "num_attention_heads", path)
    hidden = _integer(values, "hidden_size", path)
    vocab = _integer(values, "vocab_size", path)
    theta, scaling = _rope(values, path)
    if not values.get("head_dim") and hidden % heads:
        raise UserError(f"{path}: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=_integer(values, "intermediate_size", path),
        num_layers=_integer(values, "num_hidden_layers", path),
        num_heads=heads,
        num_kv_heads=_integer(values, "num_key_value_heads", path, heads),
        head_dim=_integer(values, "head_dim", path, hidden // heads),
        norm_eps=_number(values, "rms_norm_eps", path, 1e-6),
        rope_theta=theta,
        max_positions=_integer(values, "max_position_embeddings", path, 2048),
        eos_ids=_token_ids(values, path, vocab),
        rope_scaling=scaling,
        tie_embeddings=_flag(values, "tie_word_embeddings", path),
        attention_bias=_flag(values, "attention_bias", path),
        mlp_bias=_flag(values, "mlp_bias", path),
    )


def write_model_config(config: ModelConfig, bos_id: int, dtype: str) -> dict[str, Any]:
    """The ``config.json`` of a base, as transformers and :func:`read_model_config` read it."""
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "bos_token_id": bos_id,
        "eos_token_id": list(config.eos_ids) if len(config.eos_ids) != 1 else config.eos_ids[0],
        "torch_dtype": dtype,
    }
    scaling = config.rope_scaling
    if scaling is not None:
        values["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return values


def _rope(values: dict[str, Any], path: Path) -> tuple[float, Llama3Scaling | None]:
    """Base wavelength and scaling from either spelling; the newer one wins where both are there."""
    parameters = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise UserError(f"{path}: rope_parameters is {parameters!r}: expected an object")
    theta = _number({**values, **parameters}, "rope_theta", path, 10000.0)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    require(kind == "llama3", f"{path}: rope_type", kind, "'default' or 'llama3'")
    return theta, Llama3Scaling(
        factor=_number(parameters, "factor", path),
        low_freq_factor=_number(parameters, "low_freq_factor", path),
        high_freq_factor=_number(parameters, "high_freq_factor", path),
        original_max_positions=_integer(parameters, "original_max_position_embeddings", path),
    )


def _integer(values: dict[str, Any], name: str, path: Path, default: int | None = None) -> int:
    value = values.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{path}: {name} is {value!r}: expected a whole number of at least 1")
    return value


def _number(values: dict[str, Any], name: str, path: Path, default: float | None = None) -> float:
    value = values.get(name)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < LARGEST:
        raise UserError(f"{path}: {name} is {value!r}: expected a finite number above 0")
    return float(value)


def _flag(values: dict[str, Any], name: str, path: Path) -> bool:
    value = values.get(name)
    value = False if value is None else value
    require(isinstance(value, bool), f"{path}: {name}", value, "true or false")
    return value


def _token_ids(values: dict[str, Any], path: Path, vocab: int) -> tuple[int, ...]:
    value = values.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    good = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab for i in ids)
    require(good, f"{path}: eos_token_id", value, f"a token id below {vocab} or a list of them")
    return tuple(ids)
