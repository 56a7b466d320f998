"""``python -m milora_jax``, see ``milora_jax.commands.index``."""

from milora_jax.commands.command_line import run_command
from milora_jax.commands.index import main

if __name__ == "__main__":
    run_command(main)
