"""Small random models for the tests: as a pytree, or as a Hugging Face directory."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from milora_jax.base.hf import save_base
from milora_jax.base.hf_config import write_model_config
from milora_jax.base.modules import Base, Layer, Linear
from milora_jax.base.quantized import SCHEMES
from milora_jax.base.specs import LeafSpec, base_specs
from milora_jax.model_config import ModelConfig
from milora_jax.types import EXPERTS

TINY = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    norm_eps=1e-5,
    rope_theta=1e4,
    max_positions=128,
    eos_ids=(2,),
)

SMALL = {
    **{name: {"rank": 4} for name in ("milora", "midora", "lora", "dora", "adalora", "ssp")},
    "moelora": {"rank": 8, "num_experts": 4, "top_k": 2},
    **{name: {"width": 6} for name in ("ia3", "bitfit", "parallel_adapter", "learned_adapter")},
    **{name: {"width": 6, "tokens": 3} for name in ("p_tuning_v2", "iapt")},
}
"""Settings of every method that suit a model as small as these."""


def small(settings: dict) -> dict:
    """The small settings of the method that ``settings`` names, or of MiLoRA."""
    return SMALL[settings.get("method", "milora")]


QUANTIZABLE = ModelConfig(
    **{
        **vars(TINY),
        "vocab_size": 96,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_layers": 2,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 16,
    }
)
"""Wide enough for NF4's blocks."""

WITH_TOKENIZER = ModelConfig(**{**vars(TINY), "vocab_size": 320, "max_positions": 512})


def random_base(config: ModelConfig = TINY, seed: int = 0, dtype: str = "float32") -> Base:
    """A base with weights of ordinary size, so that every part of it matters."""
    rng = np.random.default_rng(seed)

    def draw(spec: LeafSpec) -> jax.Array:
        is_norm = "norm" in spec.parts[0].name
        centre = 1.0 if is_norm and not config.norm_unit_offset else 0.0
        values = rng.normal(size=spec.shape) * (0.1 if is_norm else 0.2) + centre
        return jnp.asarray(values.astype(np.float32), dtype)

    return jax.tree.map(draw, base_specs(config))


def tame_base(config: ModelConfig) -> Base:
    """A random base whose layers amplify little: with the whole weights, whose attention is all but one-hot,
    float32 alone puts gradients 2e-5 apart, and PEFT's own as far from those of float64."""

    def halved(path: tuple, leaf: jax.Array) -> jax.Array:
        return leaf * 0.5 if "kernel" in jax.tree_util.keystr(path) else leaf

    return jax.tree_util.tree_map_with_path(halved, random_base(config))


def quantized_base(config: ModelConfig, quantize: str) -> Base:
    """The random base, quantised, layers stacked."""
    base, scheme = random_base(config), SCHEMES[quantize]

    def encoded(module: Linear) -> Linear:
        kernels = np.asarray(module.kernel[...])
        scales = [scheme.scales_of(kernel) for kernel in kernels]
        codes = [scheme.codes_of(*pair) for pair in zip(kernels, scales, strict=True)]
        return Linear(jnp.asarray(np.stack(codes)), _bias(module), jnp.asarray(np.stack(scales)))

    return _with_modules(base, encoded)


def decoded_base(base: Base) -> Base:
    """A plain base with the values of a quantised one, layers stacked."""
    return _with_modules(base, lambda module: Linear(module.dense(base.dtype), _bias(module)))


def _bias(module: Linear) -> jax.Array | None:
    return None if module.bias is None else module.bias[...]


def _with_modules(base: Base, change: Callable[[Linear], Linear]) -> Base:
    layers = base.layers
    modules = {name: change(getattr(layers, name)) for name in EXPERTS}
    changed = Layer(layers.norms, modules)
    return Base(
        base.embedding[...], changed, base.final_norm[...], None if base.head is None else base.head[...]
    )


def write_hf_directory(
    path: Path,
    config: ModelConfig = WITH_TOKENIZER,
    seed: int = 0,
    dtype: str = "float32",
    tokenizer: bool = True,
    base: Base | None = None,
) -> None:
    """A complete small LLaMA directory: config.json, model.safetensors and a byte-level tokenizer."""
    path.mkdir(parents=True, exist_ok=True)
    save_base(path, random_base(config, seed) if base is None else base, config, dtype)
    (path / "config.json").write_text(json.dumps(write_model_config(config, bos_id=1, dtype=dtype)))
    if tokenizer:
        write_tokenizer(path, config.vocab_size)


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """A byte-level BPE tokenizer with the ids <unk> 0, <s> 1, </s> 2, <pad> 3."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", "<pad>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["Below is an instruction that describes a task. Write a response."] * 4, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token=names[0], bos_token=names[1], eos_token=names[2], pad_token=names[3]
    ).save_pretrained(path)
