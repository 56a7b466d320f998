"""``python -m milora_jax.serving``, see ``milora_jax.commands.serving``."""

from milora_jax.commands.startup import begin

if __name__ == "__main__":
    begin()

    from milora_jax.commands.command_line import run_command
    from milora_jax.commands.serving import main

    run_command(main)
