"""``python -m milora_jax.evaluation study NAME --config FILE``: a table or figure of the paper anew.

Writes under ``--workdir``: ``study.json``, ``cells/`` with one folder per trained model, ``rows.jsonl``
with one line per (method, task, seed), ``NAME.md`` and its plots. The same command run again goes on
where it stopped; run twice at a time, the two share the work.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from milora_jax.cli import Console, Parser, stop_noted
from milora_jax.errors import require
from milora_jax.evaluation.study.reports import COMPARISONS, report
from milora_jax.evaluation.study.runner import StudyRunner, claim_study, study_lock
from milora_jax.evaluation.study.settings import load_study, narrowed, quick
from milora_jax.evaluation.study.tuning import Chosen
from milora_jax.storage.files import write_atomic

ALL = "all"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python -m milora_jax.evaluation study",
        description=__doc__,
    )
    parser.add_argument("name", choices=[*COMPARISONS, ALL], help="table or figure; 'all' makes every one")
    parser.add_argument("--config", required=True, type=Path, help="file with get_study()")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each cell")
    parser.add_argument("--workdir", type=Path, help="default: runs/NAME_OF_THE_CONFIG")
    parser.add_argument("--tasks", default="", help="comma-separated; all by default")
    parser.add_argument("--methods", default="", help="comma-separated; all by default")
    parser.add_argument("--quick", action="store_true", help="a rehearsal: few steps, figures mean nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Tune, run the cells, write the report."""
    arguments = parse_arguments(argv)
    require(arguments.seeds >= 1, "--seeds", arguments.seeds, "at least 1")
    study = narrowed(load_study(arguments.config), arguments.tasks, arguments.methods)
    below = f"at most the study's tuning_seed {study.tuning_seed}"
    require(arguments.seeds <= study.tuning_seed, "--seeds", arguments.seeds, below)
    if arguments.quick:
        study = quick(study)
    folder = arguments.config.stem + ("_quick" if arguments.quick else "")
    directory, console = arguments.workdir or Path("runs") / folder, Console()
    names = list(COMPARISONS) if arguments.name == ALL else [arguments.name]
    if arguments.name == ALL and study.converged is None:
        names = [name for name, made in COMPARISONS.items() if not made.converged]
    unknown = Chosen.nothing(study)
    needed = [cell for name in names for cell in COMPARISONS[name].plan(study, 1, unknown)]
    with stop_noted() as preempted:
        runner = StudyRunner(study, directory, console, preempted)
        claim_study(directory, study)
        chosen = runner.choose(needed)
        for name in names:
            cells = COMPARISONS[name].plan(study, arguments.seeds, chosen)
            runner.run(cells, name)
            runner.write_rows(cells)
            with study_lock(directory):
                text = report(name, study, runner.scored_rows(cells), chosen, arguments.seeds, directory)
                write_atomic(directory / f"{name}.md", text.encode())
            console.say(f"wrote {directory / f'{name}.md'}")
