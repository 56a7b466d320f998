"""``python -m milora_jax.evaluation``, see ``milora_jax.commands.evaluation``."""

from milora_jax.commands.startup import begin

if __name__ == "__main__":
    begin()

    from milora_jax.commands.command_line import run_command
    from milora_jax.commands.evaluation import main

    run_command(main)
