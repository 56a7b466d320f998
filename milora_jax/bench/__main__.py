"""``python -m milora_jax.bench``, see ``milora_jax.commands.bench``."""

from milora_jax.commands.bench import main
from milora_jax.commands.command_line import run_command

if __name__ == "__main__":
    run_command(main)
