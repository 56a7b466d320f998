"""``python -m milora_jax.storage``, see ``milora_jax.commands.storage``."""

from milora_jax.commands.command_line import run_command
from milora_jax.commands.storage import main

if __name__ == "__main__":
    run_command(main)
