"""``python -m milora_jax.bench files``: write a random model of a known shape, and adapters for it.

``serve.py`` and other servers can load them where there is no real model: ``DIR/model``, a Hugging Face
directory with a tokenizer of all of its words, and ``DIR/adapter0``, ``DIR/adapter1``, ..., exported MiLoRAs.
"""

from __future__ import annotations

import itertools
import json
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from milora_jax.base.fingerprint import base_fingerprint
from milora_jax.base.hf import INDEX_NAME
from milora_jax.base.hf_config import write_model_config
from milora_jax.base.known import SHAPES
from milora_jax.base.load import load_base
from milora_jax.base.specs import base_specs
from milora_jax.bench.models import random_adapter
from milora_jax.bench.rounds import BenchSettings, option
from milora_jax.config import DTYPES, AdapterSection
from milora_jax.errors import UserError
from milora_jax.model_config import ModelConfig
from milora_jax.storage.adapters import adapter_metadata
from milora_jax.storage.exported import write_exported

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")


@dataclass(frozen=True)
class Settings(BenchSettings):
    """The settings of ``bench files``.

    Attributes:
      into: a new directory.
      shape: shape of the model.
      dtype: dtype of the stored weights.
      adapters: number of adapters to write.
      rank: rank of a module's matrices, of all experts together.
      top_k: experts that a prompt chooses.
    """

    into: Path
    shape: str = option("llama-30m", choices=SHAPES)
    dtype: str = option("float32", choices=DTYPES)
    adapters: int = option(2, least=0)
    rank: int = option(32, least=1)
    top_k: int = option(3, least=1)


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Write the files and yield their paths."""
    if settings.into.exists():
        raise UserError(f"--into {str(settings.into)!r} exists: expected a new directory")
    model = settings.into / "model"
    write_model(model, SHAPES[settings.shape], settings.dtype)
    adapter = AdapterSection(method="milora", rank=settings.rank, top_k=settings.top_k)
    adapters = write_adapters(settings.into, model, adapter, settings.adapters)
    yield {"model": str(model), "adapters": [str(path) for path in adapters]}


def write_model(directory: Path, config: ModelConfig, dtype: str) -> None:
    """Write a Hugging Face directory with random weights and a tokenizer."""
    directory.mkdir(parents=True)
    write_random(directory, config, dtype, 2**29)
    write_tokenizer(directory, config.vocab_size)


def write_adapters(folder: Path, model: Path, settings: AdapterSection, count: int) -> list[Path]:
    """Write adapters for a model whose matrices are not zero, as after training."""
    base, config = load_base(model, decode=True)
    fingerprint, found = base_fingerprint(model), []
    for number in range(count):
        adapter = random_adapter(base, config, settings, 7 * number)
        directory = folder / f"adapter{number}"
        directory.mkdir()
        metadata = adapter_metadata(adapter.method, adapter.shape, fingerprint, "none", adapter.prompt_format)
        write_exported(directory, adapter, metadata)
        found.append(directory)
    return found


def write_random(directory: Path, config: ModelConfig, dtype: str, shard_bytes: int) -> None:
    """Write ``config.json`` and random weights, shard by shard."""
    from safetensors.numpy import save_file

    rng, shard, places, number = np.random.default_rng(0), {}, {}, 0

    def write() -> None:
        nonlocal number
        number += 1
        name = f"model-{number:05d}.safetensors"
        save_file(shard, directory / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    shapes = {
        part.name: spec.tensor_shape(part)[:: -1 if spec.transposed else 1]
        for spec in jax.tree.leaves(base_specs(config, decode=True))  # layer by layer
        for part in spec.parts
    }
    for name, shape in shapes.items():
        values = (0.02 * rng.standard_normal(shape, dtype=np.float32)).astype(jnp.dtype(dtype))
        shard[name] = values
        if sum(tensor.nbytes for tensor in shard.values()) >= shard_bytes:
            write()
    if shard:
        write()
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (directory / "config.json").write_text(json.dumps(write_model_config(config, 1, dtype)))


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Write a byte-level tokenizer in which every id is a text: 256 bytes, and words of letters and
    digits."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {name: i for i, name in enumerate((*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    merges = []
    for word in itertools.islice(_words(), max(0, vocab_size - len(vocab))):
        vocab[word] = len(vocab)
        merges.append((word[:-1], word[-1]))
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    unk, bos, eos, pad = SPECIAL
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unk, bos_token=bos, eos_token=eos, pad_token=pad
    ).save_pretrained(directory)


def _words() -> Iterator[str]:
    """Words of two letters, then of three, and so on; each without its last letter is an earlier word."""
    for length in itertools.count(2):
        for letters in itertools.product(string.ascii_letters + string.digits, repeat=length):
            yield "".join(letters)
