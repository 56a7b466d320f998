"""``python -m milora_jax.parallel``, see ``milora_jax.commands.parallel``."""

from milora_jax.commands.command_line import run_command
from milora_jax.commands.parallel import main

if __name__ == "__main__":
    run_command(main)
