"""``python -m milora_jax.evaluation study NAME --config FILE``: reproduce a table or figure of the paper.

It writes under ``--workdir``: ``study.json``, ``cells/`` with one folder per trained model, ``rows.jsonl``
with one line per (method, task, seed), ``NAME.md`` and its plots. Run the same command to resume; two
processes that run it at the same time share the work.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from milora_jax.addresses import local_path
from milora_jax.commands.command_line import Parser
from milora_jax.console import Console
from milora_jax.errors import require
from milora_jax.evaluation.study.identity import claim_study, study_lock
from milora_jax.evaluation.study.reports import COMPARISONS, report
from milora_jax.evaluation.study.runner import StudyRunner
from milora_jax.evaluation.study.settings import load_study, narrowed, quick
from milora_jax.evaluation.study.tuning import Chosen
from milora_jax.preemption import watch_for_preemption
from milora_jax.storage.files import write_atomic

ALL = "all"


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the options."""
    parser = Parser(
        prog="python -m milora_jax.evaluation study",
        description=__doc__,
    )
    parser.add_argument("name", choices=[*COMPARISONS, ALL], help="table or figure; 'all' makes every one")
    parser.add_argument("--config", required=True, type=local_path, help="file with get_study()")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each cell")
    parser.add_argument("--workdir", type=local_path, help="default: runs/NAME_OF_THE_CONFIG")
    parser.add_argument("--tasks", default="", help="comma-separated; all by default")
    parser.add_argument("--methods", default="", help="comma-separated; all by default")
    parser.add_argument("--quick", action="store_true", help="a rehearsal: few steps, figures mean nothing")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Tune, run the cells, and write the report."""
    asked = parse_arguments(arguments)
    require(asked.seeds >= 1, "--seeds", asked.seeds, "at least 1")
    study = narrowed(load_study(asked.config), asked.tasks, asked.methods)
    below = f"at most the study's tuning_seed {study.tuning_seed}"
    require(asked.seeds <= study.tuning_seed, "--seeds", asked.seeds, below)
    if asked.quick:
        study = quick(study)
    folder = asked.config.stem + ("_quick" if asked.quick else "")
    directory, console = asked.workdir or Path("runs") / folder, Console()
    names = list(COMPARISONS) if asked.name == ALL else [asked.name]
    if asked.name == ALL and study.converged is None:
        names = [name for name, made in COMPARISONS.items() if not made.converged]
    unknown = Chosen.nothing(study)
    needed = [cell for name in names for cell in COMPARISONS[name].plan(study, 1, unknown)]
    with watch_for_preemption() as preempted:
        runner = StudyRunner(study, directory, console, preempted)
        claim_study(directory, study)
        chosen = runner.choose(needed)
        for name in names:
            cells = COMPARISONS[name].plan(study, asked.seeds, chosen)
            runner.run(cells, name)
            runner.write_rows(cells)
            with study_lock(directory):
                text = report(name, study, runner.scored_rows(cells), chosen, asked.seeds, directory)
                write_atomic(directory / f"{name}.md", text.encode())
            console.log(f"wrote {directory / f'{name}.md'}")
