"""Make the embedded model and its tasks again.

python -m milora_jax.tiny model --out DIR    # about an hour on two CPU cores
python -m milora_jax.tiny tasks --out DIR    # a few seconds
"""

from __future__ import annotations

from pathlib import Path

from milora_jax.cli import Console, Parser
from milora_jax.errors import require, run_command
from milora_jax.tiny import MODEL_DIR, TASKS_DIR

STEPS = 4000
SEED = 2410


def main() -> None:
    """Parse the command line and run it."""
    parser = Parser(
        prog="python -m milora_jax.tiny", description="Make the embedded model or its tasks again."
    )
    parser.add_argument("what", nargs="?", choices=("model", "tasks"), default="model")
    parser.add_argument("--out", type=Path, help="folder to write, by default the one in the package")
    parser.add_argument("--seed", type=int, default=SEED, help="of the rows and of the training")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps of the model")
    arguments = parser.parse_args()
    require(arguments.steps >= 1, "--steps", arguments.steps, "at least 1")
    require(arguments.seed >= 0, "--seed", arguments.seed, "0 or more")
    if arguments.what == "tasks":
        from milora_jax.tiny.tasks import write_tasks

        write_tasks(arguments.out or TASKS_DIR, arguments.seed)
        return
    from milora_jax.tiny.pretrain import pretrain

    console = Console()
    out = arguments.out or MODEL_DIR
    loss = pretrain(out, arguments.steps, arguments.seed, console)
    console.say(f"wrote {out}, last loss {loss:.3f} nats per token")


if __name__ == "__main__":
    run_command(main)
