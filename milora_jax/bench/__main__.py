"""``python -m milora_jax.bench decode|train|load|serve|overhead|files ...``: one JSON object per line."""

from __future__ import annotations

import importlib
import sys

from milora_jax.errors import UserError, run_command

WHAT = ("decode", "train", "load", "serve", "overhead", "files")


def main() -> None:
    """Run the benchmark that the first argument names."""
    what = sys.argv[1] if len(sys.argv) > 1 else ""
    if what not in WHAT:
        raise UserError(f"command line: {what!r}: expected one of {', '.join(WHAT)}")
    importlib.import_module(f"milora_jax.bench.{what}").main(sys.argv[2:])


if __name__ == "__main__":
    run_command(main)
