"""``python -m milora_jax.bench``, see ``milora_jax.commands.bench``."""

from milora_jax.commands.startup import begin

if __name__ == "__main__":
    begin()

    from milora_jax.commands.bench import main
    from milora_jax.commands.command_line import run_command

    run_command(main)
