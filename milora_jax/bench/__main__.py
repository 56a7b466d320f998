"""``python -m milora_jax.bench decode|train|load|serve|overhead|files ...``: one JSON object per line."""

from __future__ import annotations

import importlib
import sys

from milora_jax.cli import chosen_command
from milora_jax.errors import run_command

WHAT = {
    "decode": "how fast prompts are continued",
    "train": "how fast an adapter is trained",
    "load": "how fast a base is read from a disk, beside the disk itself",
    "serve": "a running server under load, and what became of every request",
    "overhead": "what a server costs beside the engine that it runs",
    "files": "a random model of a known shape on the disk, and adapters for it",
}


def main() -> None:
    """Run the benchmark that the first argument names."""
    what = chosen_command("python -m milora_jax.bench", sys.argv[1:], WHAT)
    importlib.import_module(f"milora_jax.bench.{what}").main(sys.argv[2:])


if __name__ == "__main__":
    run_command(main)
