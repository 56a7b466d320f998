"""Fine-tune a frozen LLaMA-architecture model with MiLoRA.

    python train.py --config configs/tiny.py
    python train.py --config configs/llama7b_math.py --config.model.path=DIR --workdir runs/math
    python train.py --config configs/paper.py:lora,boolq --config.model.path=DIR

Any setting of the config can be given as ``--config.group.field=value``: ``--help`` lists them, and
``docs/configuration.md`` has what those of ``adapter`` mean for each method. What follows a colon is handed
to the config file. On a cluster the same command is run on every host (docs/scaling.md).

Everything is written under the workdir, and the same command run again resumes:

    config.json      the settings of the run
    metrics.jsonl    one line per logged step or dev evaluation
    checkpoints/     the newest states of training
    best/            the adapter with the lowest dev perplexity
    routing.png      which experts each layer chose, per task; routing_health.png: how the choice settled
    summary.json     accuracy, loss and measures of free text before and after, parameters, speed
"""

from __future__ import annotations

import time

from milora_jax.cli import Console, stop_noted
from milora_jax.errors import run_command
from milora_jax.evaluation.final import (
    check_tests,
    evaluate_adapter,
    evaluate_base,
    require_learned,
    write_report,
)
from milora_jax.parallel.processes import is_first, together
from milora_jax.train_flags import parse_train_flags
from milora_jax.training.loop import Trainer
from milora_jax.training.prepare import prepare_run
from milora_jax.training.workdir import claimed


def main() -> None:
    """Prepare, score the base, train, score the best adapter, report."""
    started = time.monotonic()
    config, workdir, cluster = parse_train_flags()
    # JAX takes SIGTERM for itself when it joins other processes: ours is noted after that.
    with together(cluster), stop_noted() as preempted:
        console = Console(silent=not is_first())
        with console.loading("base") as progress:
            run = prepare_run(config, workdir, console.say, progress)
        check_tests(run.tests, console.say)
        with claimed(workdir, run.config):
            console.say(f"workdir {workdir}: {run.model.num_layers} layers, {config.adapter.method}")
            before = evaluate_base(run, workdir, console, preempted)
            trainer = Trainer(run, workdir, console.say)
            with console.progress("training", trainer.total_steps, "step") as bar:
                fit = trainer.fit(bar.reach, preempted)
            after = evaluate_adapter(run, workdir, console, preempted)
            seconds = fit.earlier_seconds + time.monotonic() - started
            if is_first():
                write_report(run, workdir, fit, before, after, seconds)
    require_learned(run, fit)


if __name__ == "__main__":
    run_command(main)
