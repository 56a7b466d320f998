"""A digest that tells two model directories apart without reading all of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from milora_jax.base.byte_files import ByteFile, LocalFile
from milora_jax.base.source import weight_files
from milora_jax.errors import UserError

WHOLE_BELOW = 2**20
"""Files of up to this many bytes are read whole, larger ones by samples."""

SAMPLES, SAMPLE_BYTES = 64, 4096
"""The samples of a large file are 256 KiB: two trainings of one model differ everywhere, so a few samples
tell them apart. The digest is no protection against deliberate deception."""

NAMES = (
    "config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "*.safetensors.*",
)
"""Files beside the weights that decide what a base computes and how text becomes tokens."""


def base_fingerprint(directory: Path) -> str:
    """SHA-256 of the names, sizes and contents of a Hugging Face directory's files, large ones sampled.

    Raises:
      UserError: there is no such directory, or a file cannot be read.
    """
    if not directory.is_dir():
        raise UserError(f"{str(directory)!r}: no such directory, expected a Hugging Face model")
    files: dict[str, ByteFile] = {
        path.name: LocalFile(path) for pattern in NAMES for path in directory.glob(pattern) if path.is_file()
    }
    digest = hashlib.sha256()
    for name, file in sorted({**files, **weight_files(directory)}.items()):
        size = file.size()
        digest.update(f"{name}\0{size}\0".encode())
        starts = [i * (size - SAMPLE_BYTES) // (SAMPLES - 1) for i in range(SAMPLES)]
        spans = [(0, size)] if size <= WHOLE_BELOW else [(start, start + SAMPLE_BYTES) for start in starts]
        for part in file.read(spans):
            digest.update(part)
    return digest.hexdigest()
