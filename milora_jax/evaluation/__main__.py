"""``python -m milora_jax.evaluation --workdir DIR --data FILE``: accuracy as JSON, predictions as JSONL.

``study NAME --config FILE`` compares methods, see ``evaluation.study``; ``lm-eval`` is lm-evaluation-harness
with a tuned model, see ``evaluation.harness_command``; ``mt-bench`` answers and judges MT-Bench, see
``evaluation.mt_bench_command``; ``routing`` draws which experts prompts choose, see ``evaluation.routing``.
"""

from __future__ import annotations

import sys

from milora_jax.errors import run_command
from milora_jax.evaluation.harness_command import main as harness_main
from milora_jax.evaluation.mt_bench_command import main as mt_bench_main
from milora_jax.evaluation.routing_command import main as routing_main
from milora_jax.evaluation.score_command import main as score_main
from milora_jax.evaluation.study.command import main as study_main

COMMANDS = {
    "study": study_main,
    "lm-eval": harness_main,
    "mt-bench": mt_bench_main,
    "routing": routing_main,
}
"""By their names; without one, answers are scored."""


def main() -> None:
    """Score answers, see ``evaluation.score_command``; or one of the other commands."""
    command = COMMANDS.get(sys.argv[1] if len(sys.argv) > 1 else "")
    if command is None:
        score_main(sys.argv[1:])
    else:
        command(sys.argv[2:])


if __name__ == "__main__":
    run_command(main)
