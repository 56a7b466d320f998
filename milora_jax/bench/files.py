"""``python -m milora_jax.bench files``: a random model of a known shape on the disk, and adapters for it.

What ``serve.py`` and other servers can load where no real model is at hand: ``DIR/model``, a Hugging Face
directory with a tokenizer of all of its words, and ``DIR/adapter0``, ``DIR/adapter1``, ... exported MiLoRAs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import string
from collections.abc import Iterator
from pathlib import Path

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
from milora_jax.bench.rounds import require_least, require_names
from milora_jax.cli import Parser
from milora_jax.config import DTYPES, AdapterSection
from milora_jax.errors import UserError
from milora_jax.model_config import ModelConfig
from milora_jax.storage.adapters import adapter_metadata
from milora_jax.storage.exported import write_exported

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")


def main(argv: list[str]) -> None:
    """Write, and say where."""
    asked = _parse(argv)
    if asked.into.exists():
        raise UserError(f"--into {str(asked.into)!r} exists: expected a new directory")
    model = asked.into / "model"
    write_model(model, SHAPES[asked.shape], asked.dtype)
    settings = AdapterSection(method="milora", rank=asked.rank, top_k=asked.top_k)
    adapters = write_adapters(asked.into, model, settings, asked.adapters)
    print(json.dumps({"model": str(model), "adapters": [str(path) for path in adapters]}), flush=True)


def write_model(directory: Path, config: ModelConfig, dtype: str) -> None:
    """A Hugging Face directory with random weights and a tokenizer."""
    directory.mkdir(parents=True)
    write_random(directory, config, dtype, 2**29)
    write_tokenizer(directory, config.vocab_size)


def write_adapters(folder: Path, model: Path, settings: AdapterSection, count: int) -> list[Path]:
    """Exported adapters for a model, as after training: none of their matrices is zero."""
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
    """``config.json`` and weights with random values, shard by shard."""
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
    """A byte-level tokenizer in which every id is a text: 256 bytes, and words of letters and digits."""
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
    """Of two letters, then of three, and so on: what is left of a word's last letter came before it."""
    for length in itertools.count(2):
        for letters in itertools.product(string.ascii_letters + string.digits, repeat=length):
            yield "".join(letters)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m milora_jax.bench files", description=__doc__)
    parser.add_argument("--into", type=Path, required=True, help="a new directory")
    parser.add_argument("--shape", default="llama-30m", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the stored weights")
    parser.add_argument("--adapters", type=int, default=2, help="how many are written")
    parser.add_argument("--rank", type=int, default=32, help="of every module's matrices together")
    parser.add_argument("--top-k", type=int, default=3, help="experts that a prompt chooses")
    asked = parser.parse_args(argv)
    require_least(asked, {"adapters": 0, "rank": 1, "top_k": 1})
    require_names("--shape", [asked.shape], list(SHAPES))
    return asked
