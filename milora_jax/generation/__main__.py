"""``python -m milora_jax.generation``, see ``milora_jax.commands.generation``."""

from milora_jax.commands.command_line import run_command
from milora_jax.commands.generation import main

if __name__ == "__main__":
    run_command(main)
