"""``python -m milora_jax.evaluation study NAME --config FILE``: a table or figure of the paper anew.

Writes under ``--workdir``: ``study.json``, ``cells/`` with one folder per trained model, ``rows.jsonl``
with one line per (method, task, seed), ``NAME.md`` and its plots. The same command run again goes on
where it stopped; run twice at a time, the two share the work.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from milora_jax.adapters.registry import build_method
from milora_jax.cli import Console, sigterm_noted
from milora_jax.config import require
from milora_jax.errors import UserError
from milora_jax.evaluation.study.cells import Cell
from milora_jax.evaluation.study.plans import PLANS, labels_of
from milora_jax.evaluation.study.plots import plot_bars, plot_lines, plot_shares
from milora_jax.evaluation.study.runner import StudyRunner, claim_study, settings_lines, study_lock
from milora_jax.evaluation.study.settings import Study, load_study, narrowed, quick
from milora_jax.evaluation.study.tables import Results, comparison, dev_only, mixing, tuned
from milora_jax.storage.files import write_atomic

ALL = "all"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = _Parser(
        prog="python -m milora_jax.evaluation study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=[*PLANS, ALL], help="table or figure; 'all' makes every one")
    parser.add_argument("--config", required=True, type=Path, help="file with get_study()")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workdir", type=Path, help="default: runs/NAME_OF_THE_CONFIG")
    parser.add_argument("--tasks", default="", help="comma-separated; all by default")
    parser.add_argument("--methods", default="", help="comma-separated; all by default")
    parser.add_argument("--quick", action="store_true", help="a rehearsal: few steps, figures mean nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Choose learning rates, run the cells, write the report."""
    arguments = parse_arguments(argv)
    require(arguments.seeds >= 1, "--seeds", arguments.seeds, "at least 1")
    study = narrowed(load_study(arguments.config), arguments.tasks, arguments.methods)
    below = f"at most the study's tuning_seed {study.tuning_seed}"
    require(arguments.seeds <= study.tuning_seed, "--seeds", arguments.seeds, below)
    if arguments.quick:
        study = quick(study)
    folder = arguments.config.stem + ("_quick" if arguments.quick else "")
    directory, console = arguments.workdir or Path("runs") / folder, Console()
    names = list(PLANS) if arguments.name == ALL else [arguments.name]
    with sigterm_noted() as preempted:
        runner = StudyRunner(study, directory, console, preempted)
        claim_study(directory, study)
        rates, losses = runner.choose_rates(labels_of(study, names))
        for name in names:
            cells = PLANS[name](study, arguments.seeds, rates)
            runner.run(cells, name)
            runner.write_rows(cells)
            with study_lock(directory):
                text = report(name, study, runner, cells, arguments.seeds, directory)
                text += "\n## Learning rates\n\nMean dev loss over the tasks, in nats per response token.\n\n"
                text += tuned({label: losses[label] for label in labels_of(study, [name])}, study) + "\n"
                write_atomic(directory / f"{name}.md", text.encode())
            console.say(f"wrote {directory / f'{name}.md'}")


def report(
    name: str, study: Study, runner: StudyRunner, cells: Sequence[Cell], seeds: int, directory: Path
) -> str:
    """The Markdown of one table or figure; draws its plots beside it."""
    results = Results.of(runner.rows(cells))
    body = REPORTS[name](results, study, directory)
    head = [f"# {name}: {TITLES[name]}", "", *settings_lines(study), f"- {seeds} seeds"]
    note = (
        "Accuracy in percent, median over the seeds. Differences are in points, paired by task and seed, "
        "with a bootstrap 95 % interval over the seeds. The dev loss is in nats per response token."
    )
    return "\n".join([*head, "", note, "", body, ""])


def _table1(results: Results, study: Study, directory: Path) -> str:
    places = results.places()
    plot_bars(directory / "table1.png", results, places, "each task by itself")
    return comparison(results, study.subject, places, counts=True) + "\n\n![](table1.png)"


def _table2(results: Results, study: Study, directory: Path) -> str:
    plot_bars(
        directory / "table2_mixed.png", results, results.places(mixed=True), "trained on the mix of tasks"
    )
    parts = [
        mixing(results, study.subject),
        "Trained on each task by itself:",
        comparison(results, study.subject, results.places(mixed=False), counts=True),
        "Trained on the mix:",
        comparison(results, study.subject, results.places(mixed=True), counts=True),
        "![](table2_mixed.png)",
    ]
    return "\n\n".join(parts)


def _variants(name: str) -> Callable[[Results, Study, Path], str]:
    def make(results: Results, study: Study, directory: Path) -> str:
        base = results.variants[0]
        single, mixed = results.places(mixed=False), results.places(mixed=True)
        parts = [comparison(results, base, single, counts=False)]
        if mixed:
            parts += ["Trained on the mix:", comparison(results, base, mixed, counts=False)]
        plot_bars(directory / f"{name}.png", results, [*single, *mixed], TITLES[name])
        return "\n\n".join([*parts, f"![]({name}.png)"])

    return make


def _curve(
    name: str, axis: str, points: Callable[[Results], dict[str, list[tuple[str, str]]]]
) -> Callable[[Results, Study, Path], str]:
    def make(results: Results, study: Study, directory: Path) -> str:
        places = results.places()
        plot_lines(directory / f"{name}.png", results, places, points(results), axis)
        return comparison(results, results.variants[0], places, counts=True) + f"\n\n![]({name}.png)"

    return make


def _by_value(results: Results) -> dict[str, list[tuple[str, str]]]:
    return {"": [(variant.split("=")[1], variant) for variant in results.variants]}


def _by_rank(results: Results) -> dict[str, list[tuple[str, str]]]:
    lines: dict[str, list[tuple[str, str]]] = {}
    for variant in results.variants:
        label, rank = variant.split(" r=")
        lines.setdefault(label, []).append((rank, variant))
    return lines


def _figure2(results: Results, study: Study, directory: Path) -> str:
    places = results.places()
    top_k = getattr(build_method(study.methods[study.subject]), "top_k", 0)
    require(top_k > 0, "study subject", study.subject, "a method that routes, for figure2")
    plot_shares(directory / "figure2.png", results, study.subject, places, top_k)
    return comparison(results, study.subject, places, counts=True) + "\n\n![](figure2.png)"


def _defaults(results: Results, study: Study, directory: Path) -> str:
    return dev_only(results, results.places())


TITLES = {
    "table1": "all methods, each task by itself",
    "table2": "single tasks against their mix",
    "table5": "ablations of the router",
    "figure2": "share of each expert, per layer and task",
    "figure3": "active experts k",
    "figure4": "weight lambda of the load-balance term",
    "figure5": "rank",
    "defaults": "what the paper leaves open",
}

REPORTS: dict[str, Callable[[Results, Study, Path], str]] = {
    "table1": _table1,
    "table2": _table2,
    "table5": _variants("table5"),
    "figure2": _figure2,
    "figure3": _curve("figure3", "k, experts of a layer in force", _by_value),
    "figure4": _curve("figure4", "lambda", _by_value),
    "figure5": _curve("figure5", "rank", _by_rank),
    "defaults": _defaults,
}
