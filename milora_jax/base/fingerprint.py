"""Which base is this: a digest that tells two model directories apart without reading all of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

WHOLE_BELOW = 2**20
"""Files up to this many bytes are read whole; of larger ones, samples."""

SAMPLES, SAMPLE_BYTES = 64, 4096
"""Of a file of many gigabytes this reads 256 KiB: two different trainings of one model differ everywhere,
so a few samples tell them apart. It is no guard against somebody who wants to deceive."""

NAMES = ("config.json", "tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "*.safetensors*")
"""The files that decide what a base computes and how text becomes its tokens."""


def base_fingerprint(directory: Path) -> str:
    """SHA-256 over the names, sizes and contents of a Hugging Face directory's files, large ones sampled.

    Raises:
      OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted({path for pattern in NAMES for path in directory.glob(pattern) if path.is_file()}):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= WHOLE_BELOW:
                digest.update(file.read())
                continue
            for i in range(SAMPLES):
                file.seek(i * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
