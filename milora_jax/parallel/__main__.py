"""``python -m milora_jax.parallel aot ...``: do a config's programs fit a TPU that is not here?"""

from __future__ import annotations

import sys

from milora_jax.cli import chosen_command
from milora_jax.errors import run_command

WHAT = {"aot": "compile a config's programs for chips that are not here, and say what they take"}


def main() -> None:
    """Run what the first argument names."""
    chosen_command("python -m milora_jax.parallel", sys.argv[1:], WHAT)
    from milora_jax.scaling.command import main as aot

    aot(sys.argv[2:])


if __name__ == "__main__":
    run_command(main)
