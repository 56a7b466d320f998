"""``python -m milora_jax`` lists the commands; ``python -m milora_jax doctor`` checks for mistakes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from milora_jax.commands.command_line import print_commands
from milora_jax.errors import one_of

COMMANDS = {
    "python train.py --config configs/NAME.py": "tune an adapter on a frozen base",
    "python serve.py --base DIR --adapter NAME=DIR": "answer OpenAI's API, many adapters on one base",
    "python -m milora_jax doctor": "what is wrong with a machine, a config, its data or a workdir",
    "python -m milora_jax.generation": "continue prompts",
    "python -m milora_jax.evaluation": "score a run; compare methods (study)",
    "python -m milora_jax.storage": "export and import adapters, verify what lies on the disk",
    "python -m milora_jax.parallel": "does a run fit chips that are not here (aot)",
    "python -m milora_jax.bench": "measure decoding, training, loading and serving",
    "python -m milora_jax.serving": "make keys for the server",
    "python -m milora_jax.tiny": "make the embedded model and its tasks again",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names; without one, list all."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help"):
        print_commands(COMMANDS)
        return
    one_of("the command", given[0], ("doctor",))
    from milora_jax.commands.doctor import main as doctor

    doctor(given[1:])
