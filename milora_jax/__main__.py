"""``python -m milora_jax`` lists the commands; ``python -m milora_jax doctor`` looks for mistakes."""

from __future__ import annotations

import sys

from milora_jax.cli import list_commands
from milora_jax.errors import one_of, run_command

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


def main() -> None:
    """Run what the first argument names; without one, list what there is."""
    if len(sys.argv) == 1 or sys.argv[1] in ("-h", "--help"):
        list_commands(COMMANDS)
        return
    one_of("the command", sys.argv[1], ("doctor",))
    from milora_jax.doctor.command import main as doctor

    doctor(sys.argv[2:])


if __name__ == "__main__":
    run_command(main)
