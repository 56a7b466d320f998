"""``python -m milora_jax.parallel aot ...``: do a config's programs fit a TPU that is not here?"""

from __future__ import annotations

import sys

from milora_jax.errors import UserError, run_command

WHAT = ("aot",)


def main() -> None:
    """Run what the first argument names."""
    what = sys.argv[1] if len(sys.argv) > 1 else ""
    if what not in WHAT:
        raise UserError(f"command line: {what!r}: expected one of {', '.join(WHAT)}")
    from milora_jax.scaling.command import main as aot

    aot(sys.argv[2:])


if __name__ == "__main__":
    run_command(main)
