"""Small random models for the tests: as a pytree, or as a Hugging Face directory."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from milora_jax.base.hf import LeafSpec, base_specs, save_base
from milora_jax.base.hf_config import write_model_config
from milora_jax.base.modules import Base
from milora_jax.config import ModelConfig

TINY = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=4,
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


WITH_TOKENIZER = ModelConfig(**{**vars(TINY), "vocab_size": 320, "max_positions": 512})


def random_base(config: ModelConfig = TINY, seed: int = 0, dtype: str = "float32") -> Base:
    """A base with weights of ordinary size, so that every part of it matters."""
    rng = np.random.default_rng(seed)

    def draw(spec: LeafSpec) -> jax.Array:
        is_norm = "norm" in spec.parts[0].name
        values = rng.normal(size=spec.shape) * (0.1 if is_norm else 0.2) + (1.0 if is_norm else 0.0)
        return jnp.asarray(values.astype(np.float32), dtype)

    return jax.tree.map(draw, base_specs(config))


def write_hf_directory(
    path: Path,
    config: ModelConfig = WITH_TOKENIZER,
    seed: int = 0,
    dtype: str = "float32",
    tokenizer: bool = True,
) -> None:
    """A complete small LLaMA directory: config.json, model.safetensors and a byte-level tokenizer."""
    path.mkdir(parents=True, exist_ok=True)
    save_base(path, random_base(config, seed), config, dtype)
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
