"""``python -m milora_jax.evaluation --workdir DIR --data FILE``: accuracy as JSON, predictions as JSONL.

``python -m milora_jax.evaluation study NAME --config FILE`` compares methods, see ``evaluation.study``.
"""

from __future__ import annotations

import sys

from milora_jax.errors import run_command
from milora_jax.evaluation.score_command import main as score_main
from milora_jax.evaluation.study.command import main as study_main


def main() -> None:
    """Score answers, see ``evaluation.score_command``; or one of the other commands, by its name."""
    if sys.argv[1:2] == ["study"]:
        study_main(sys.argv[2:])
        return
    score_main(sys.argv[1:])


if __name__ == "__main__":
    run_command(main)
