"""``python -m milora_jax``, see ``milora_jax.commands.index``."""

from milora_jax.commands.startup import begin

if __name__ == "__main__":
    begin()

    from milora_jax.commands.command_line import run_command
    from milora_jax.commands.index import main

    run_command(main)
