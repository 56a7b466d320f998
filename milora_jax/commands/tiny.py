"""Make the embedded model and its tasks again.

python -m milora_jax.tiny model --out DIR    # about an hour on two CPU cores
python -m milora_jax.tiny tasks --out DIR    # a few seconds
"""

from __future__ import annotations

from collections.abc import Sequence

from milora_jax.addresses import local_path
from milora_jax.commands.command_line import Parser
from milora_jax.console import Console
from milora_jax.errors import require
from milora_jax.tiny import MODEL_DIR, TASKS_DIR

STEPS = 4000
SEED = 2410


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the model, or the tasks."""
    parser = Parser(prog="python -m milora_jax.tiny", description=__doc__)
    parser.add_argument("what", nargs="?", choices=("model", "tasks"), default="model")
    parser.add_argument("--out", type=local_path, help="folder to write, by default the one in the package")
    parser.add_argument("--seed", type=int, default=SEED, help="of the rows and of the training")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps of the model")
    asked = parser.parse_args(arguments)
    require(asked.steps >= 1, "--steps", asked.steps, "at least 1")
    require(asked.seed >= 0, "--seed", asked.seed, "0 or more")
    if asked.what == "tasks":
        from milora_jax.tiny.preferences import write_preferences
        from milora_jax.tiny.tasks import write_tasks

        write_tasks(asked.out or TASKS_DIR, asked.seed)
        write_preferences(asked.out or TASKS_DIR, asked.seed)
        return
    from milora_jax.tiny.pretrain import pretrain

    console = Console()
    out = asked.out or MODEL_DIR
    loss = pretrain(out, asked.steps, asked.seed, console)
    console.log(f"wrote {out}, last loss {loss:.3f} nats per token")
