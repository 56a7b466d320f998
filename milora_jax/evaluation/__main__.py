"""``python -m milora_jax.evaluation``, see ``milora_jax.commands.evaluation``."""

from milora_jax.commands.command_line import run_command
from milora_jax.commands.evaluation import main

if __name__ == "__main__":
    run_command(main)
