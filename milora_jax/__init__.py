"""MiLoRA (arXiv 2410.18035) in JAX: prompt-routed low-rank experts on a frozen Transformer.

The names below are loaded when they are first used, so importing the package starts no device and
pulls in no heavy library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from milora_jax.base.load import load_base, logits
    from milora_jax.generation.text import generate
    from milora_jax.run import train
    from milora_jax.storage.adapters import load_adapter

__version__ = "0.1.0.dev0"

_HOMES = {
    "load_base": "milora_jax.base.load",
    "logits": "milora_jax.base.load",
    "load_adapter": "milora_jax.storage.adapters",
    "generate": "milora_jax.generation.text",
    "train": "milora_jax.run",
}

__all__ = ["generate", "load_adapter", "load_base", "logits", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'milora_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
