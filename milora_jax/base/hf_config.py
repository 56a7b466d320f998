"""``config.json`` of a Hugging Face directory to and from ``ModelConfig``.

Only what is implemented is accepted: a key that asks for something else is refused by name, because a model
that loads and computes the wrong function is worse than one that does not load. Code in a directory
(``auto_map``) is never run: only the family's name counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from milora_jax.base.families import EXPERT_COUNTS, FAMILIES, SWITCHES, UNSUPPORTED, Family
from milora_jax.base.json_files import read_json_object
from milora_jax.errors import UserError, one_of, require
from milora_jax.model_config import LinearScaling, Llama3Scaling, ModelConfig

LARGEST = 1e30
"""Upper bound of a model's constants; JSON numbers may be infinite or have hundreds of digits."""

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
"""Our names for Hugging Face's activations."""

SLIDING, FULL = "sliding_attention", "full_attention"


def read_model_config(directory: Path) -> ModelConfig:
    """Read and check ``config.json`` of a model of one of the ``FAMILIES``.

    Both spellings of the rotary settings are read: ``rope_theta`` with ``rope_scaling``, and
    ``rope_parameters`` of transformers 5. For a Gemma 3 with images the ``text_config`` is read.
    ``generation_config.json`` may name further tokens that end a text.

    Raises:
      UserError: a key is missing or ill-typed, or the architecture or a feature is not supported.
    """
    if not directory.is_dir():
        raise UserError(f"model.path {str(directory)!r}: no such directory, expected a Hugging Face model")
    path = directory / "config.json"
    given = read_json_object(path)
    if given.get("model_type") == "gemma3" and isinstance(given.get("text_config"), dict):
        given = {"model_type": "gemma3_text", **given["text_config"]}
    name = given.get("model_type")
    one_of(f"{path}: model_type", name if isinstance(name, str) else repr(name), tuple(FAMILIES))
    family = FAMILIES[str(name)]
    _refuse_the_rest(given, family, path)
    values = {**family.defaults, **given}
    heads = _integer(values, "num_attention_heads", path)
    hidden = _integer(values, "hidden_size", path)
    vocab = _integer(values, "vocab_size", path)
    layers = _integer(values, "num_hidden_layers", path)
    theta, local_theta, scaling = _rope(values, family, path)
    window, pattern = _window(values, family, layers, path)
    if not values.get("head_dim") and hidden % heads:
        raise UserError(f"{path}: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=_integer(values, family.expert_width, path),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_integer(values, "num_key_value_heads", path, heads),
        head_dim=_integer(values, "head_dim", path, hidden // heads),
        norm_eps=_number(values, "rms_norm_eps", path, 1e-6),
        rope_theta=theta,
        max_positions=_integer(values, "max_position_embeddings", path, 2048),
        eos_ids=_eos_ids(values, directory, vocab),
        rope_scaling=scaling,
        tie_embeddings=_flag(values, "tie_word_embeddings", path),
        activation=_activation(values, family, path),
        query_scalar=_optional(values, "query_pre_attn_scalar", path),
        attention_softcap=_optional(values, "attn_logit_softcapping", path),
        final_softcap=_optional(values, "final_logit_softcapping", path),
        sliding_window=window,
        sliding_pattern=pattern,
        local_rope_theta=local_theta,
        family=str(name),
        **{"biased": _biased(values, path), **_experts(values, given, family, path), **family.fixed},
    )


def write_model_config(config: ModelConfig, bos_id: int, dtype: str) -> dict[str, Any]:
    """Make the ``config.json`` of a base that transformers and :func:`read_model_config` read."""
    family, scaling = FAMILIES[config.family], config.rope_scaling
    activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation)
    values = {
        "architectures": [family.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        **dict.fromkeys(family.activation_keys, activation),
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": bos_id,
        "pad_token_id": None,
        "eos_token_id": list(config.eos_ids) if len(config.eos_ids) != 1 else config.eos_ids[0],
        "torch_dtype": dtype,
    }
    scalar = config.head_dim if config.query_scalar is None else config.query_scalar
    switches = {
        "attention_bias": "q" in config.biased,
        "mlp_bias": "gate" in config.biased,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.final_softcap,
        # transformers rejects 256.0 as a whole number.
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "sliding_window": config.sliding_window,
        "use_sliding_window": config.sliding_window is not None,
        "rope_local_base_freq": config.local_rope_theta,
    }
    values |= {name: switches[name] for name in family.switches}
    if config.num_experts:
        values |= {
            EXPERT_COUNTS["num_local_experts" in family.defaults]: config.num_experts,
            "num_experts_per_tok": config.experts_per_token,
            family.expert_width: config.intermediate_size,
        }
        values |= {} if "norm_topk_prob" in family.fixed else {"norm_topk_prob": config.norm_topk_prob}
    if family.slides in ("late", "every"):
        values["layer_types"] = [SLIDING if slides else FULL for slides in config.slides]
    if isinstance(scaling, Llama3Scaling):
        values["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    elif scaling is not None:
        values["rope_scaling"] = {"rope_type": "linear", "factor": scaling.factor}
    return values


def _refuse_the_rest(given: dict[str, Any], family: Family, path: Path) -> None:
    """Refuse a key that is switched on and that the family does not have."""
    foreign = {name: off for name, off in SWITCHES.items() if name not in family.switches}
    if family.expert_paths is None:
        foreign |= dict.fromkeys(EXPERT_COUNTS)
    for name, off in {**foreign, **UNSUPPORTED}.items():
        value = given.get(name)
        # Equality of value and type: 0 is not false, and a list is not None.
        known = value is None or (value == off and type(value) is type(off))
        require(known, f"{path}: {name}", value, "unset: not supported")


def _experts(
    values: dict[str, Any], given: dict[str, Any], family: Family, path: Path
) -> dict[str, int | bool]:
    """The fields of a base with experts; none for a dense family."""
    if family.expert_paths is None:
        return {}
    named = [name for name in EXPERT_COUNTS if given.get(name) is not None]
    named = named or [name for name in EXPERT_COUNTS if name in family.defaults]
    counts = {name: _integer(values, name, path) for name in named}
    same = len(set(counts.values())) == 1
    require(same, f"{path}: {EXPERT_COUNTS[0]}", values.get(EXPERT_COUNTS[0]), f"the same as in {counts}")
    count, chosen = counts[named[0]], _integer(values, "num_experts_per_tok", path)
    require(chosen <= count, f"{path}: num_experts_per_tok", chosen, f"at most the {count} experts")
    normed = _flag(values, "norm_topk_prob", path)
    return {"num_experts": count, "experts_per_token": chosen, "norm_topk_prob": normed}


def _biased(values: dict[str, Any], path: Path) -> tuple[str, ...]:
    attention = ("q", "k", "v", "o") if _flag(values, "attention_bias", path) else ()
    return attention + (("gate", "up", "down") if _flag(values, "mlp_bias", path) else ())


def _activation(values: dict[str, Any], family: Family, path: Path) -> str:
    named = [name for name in family.activation_keys if values.get(name) is not None]
    name = named[0] if named else family.activation_keys[0]
    value = values[name] if named else "silu"
    known = ACTIVATIONS | ({"gelu": "gelu_tanh"} if family.gelu_is_tanh else {})
    require(isinstance(value, str) and value in known, f"{path}: {name}", value, f"one of {', '.join(known)}")
    return known[value]


def _window(
    values: dict[str, Any], family: Family, layers: int, path: Path
) -> tuple[int | None, tuple[bool, ...]]:
    """The sliding window, and whether each layer slides."""
    on = _flag(values, "use_sliding_window", path) if "use_sliding_window" in family.switches else True
    if family.slides == "none" or not on or values.get("sliding_window") is None:
        return None, (False,)
    window = _integer(values, "sliding_window", path)
    types = values.get("layer_types")
    if types is not None:
        known = isinstance(types, list) and len(types) == layers and set(map(str, types)) <= {SLIDING, FULL}
        require(known, f"{path}: layer_types", types, f"{layers} of {SLIDING!r} and {FULL!r}")
        slides = tuple(kind == SLIDING for kind in types)
    elif family.slides == "all":
        slides = (True,)
    elif family.slides == "late":
        first = _integer(values, "max_window_layers", path, least=0)
        slides = tuple(i >= first for i in range(layers))
    else:
        every = _integer(values, "sliding_window_pattern", path, family.every)
        slides = tuple((i + 1) % every > 0 for i in range(layers))
    return (window, _shortest(slides)) if any(slides) else (None, (False,))


def _shortest(pattern: tuple[bool, ...]) -> tuple[bool, ...]:
    """The shortest prefix of a pattern that gives the pattern when repeated."""
    count = len(pattern)
    lengths = (n for n in range(1, count + 1) if all(pattern[i] == pattern[i % n] for i in range(count)))
    return pattern[: next(lengths)]


def _rope(
    values: dict[str, Any], family: Family, path: Path
) -> tuple[float, float | None, Llama3Scaling | LinearScaling | None]:
    """Base wavelengths, one for sliding layers, and the scaling, from either spelling.

    The newer spelling wins where both are present.
    """
    parameters = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise UserError(f"{path}: rope_parameters is {parameters!r}: expected an object")
    local_theta = _optional(values, "rope_local_base_freq", path)
    if FULL in parameters or SLIDING in parameters:
        if "rope_local_base_freq" not in family.switches:
            raise UserError(f"{path}: rope_parameters is {parameters!r}: expected one for all layers")
        local, parameters = parameters.get(SLIDING) or {}, parameters.get(FULL) or {}
        if not isinstance(local, dict) or not isinstance(parameters, dict):
            raise UserError(f"{path}: rope_parameters holds {(local, parameters)!r}: expected objects")
        kind = local.get("rope_type", "default")
        require(kind == "default", f"{path}: rope_type of {SLIDING}", kind, "'default'")
        local_theta = _number(local, "rope_theta", path, local_theta)
    theta = _number({**values, **parameters}, "rope_theta", path, 10000.0)
    share = parameters.get("partial_rotary_factor")
    require(share in (None, 1.0), f"{path}: partial_rotary_factor", share, "1: all of a head is rotated")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, local_theta, None
    if kind == "linear":
        return theta, local_theta, LinearScaling(_number(parameters, "factor", path))
    require(kind == "llama3", f"{path}: rope_type", kind, "'default', 'linear' or 'llama3'")
    scaling = Llama3Scaling(
        factor=_number(parameters, "factor", path),
        low_freq_factor=_number(parameters, "low_freq_factor", path),
        high_freq_factor=_number(parameters, "high_freq_factor", path),
        original_max_positions=_integer(parameters, "original_max_position_embeddings", path),
    )
    return theta, local_theta, scaling


def _integer(
    values: dict[str, Any], name: str, path: Path, default: int | None = None, least: int = 1
) -> int:
    value = values.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{path}: {name} is {value!r}: expected a whole number of at least {least}")
    return value


def _number(values: dict[str, Any], name: str, path: Path, default: float | None = None) -> float:
    value = values.get(name)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < LARGEST:
        raise UserError(f"{path}: {name} is {value!r}: expected a finite number above 0")
    return float(value)


def _optional(values: dict[str, Any], name: str, path: Path) -> float | None:
    return None if values.get(name) is None else _number(values, name, path)


def _flag(values: dict[str, Any], name: str, path: Path) -> bool:
    value = values.get(name)
    value = False if value is None else value
    require(isinstance(value, bool), f"{path}: {name}", value, "true or false")
    return value


def _eos_ids(values: dict[str, Any], directory: Path, vocab: int) -> tuple[int, ...]:
    """The ids of the config, then those that only the generation config names, as for chat models."""
    ids = _token_ids(values, directory / "config.json", vocab)
    more = directory / "generation_config.json"
    if more.is_file():
        ids += _token_ids(read_json_object(more), more, vocab)
    return tuple(dict.fromkeys(ids))


def _token_ids(values: dict[str, Any], path: Path, vocab: int) -> tuple[int, ...]:
    value = values.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    good = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab for i in ids)
    require(good, f"{path}: eos_token_id", value, f"a token id below {vocab} or a list of them")
    return tuple(ids)
