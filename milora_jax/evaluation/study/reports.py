"""Every table and figure of the paper: its cells and its report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from milora_jax.adapters.registry import build_method, full_settings
from milora_jax.config import AdapterSection
from milora_jax.errors import require
from milora_jax.evaluation.study import plans
from milora_jax.evaluation.study.cells import Cell, Row
from milora_jax.evaluation.study.convergence import (
    converged_terms,
    render_converged,
    render_routing,
    tuning_tables,
)
from milora_jax.evaluation.study.plots import plot_bars, plot_lines, plot_shares
from milora_jax.evaluation.study.settings import Study
from milora_jax.evaluation.study.tables import Results, comparison, dev_only, mixing, routes
from milora_jax.evaluation.study.tuning import Chosen

ROUTES_NOTE = (
    "Of the dev prompts, at the step whose adapter is scored, mean over layers and runs: share of the "
    "prompts with the layer's commonest set of experts, over all tasks and within a task; pairs of "
    "prompts of two tasks with equal sets; layers in which 95 % or more of the prompts have one set; "
    "largest share of one token in the attention pooler; root mean square of the router's features; and "
    "the largest value that entered an activation."
)

NOT_GENERATED = (
    "- no answers were generated: accuracy is the share of test rows whose output greedy decoding would "
    "write token for token"
)


@dataclass(frozen=True)
class Comparison:
    """One table or figure.

    Attributes:
      title: title in a few words.
      plan: makes cells of ``(study, seeds, chosen)``.
      render: makes Markdown of ``(results, study, directory)``, and draws its plots into the directory.
      converged: whether it trains to convergence, for which a study needs terms.
    """

    title: str
    plan: Callable[[Study, int, Chosen], list[Cell]]
    render: Callable[[Results, Study, Path], str]
    converged: bool = False


def report(name: str, study: Study, rows: Sequence[Row], chosen: Chosen, seeds: int, directory: Path) -> str:
    """Make the Markdown of one comparison, and draw its plots beside it.

    Args:
      rows: rows with ``scores``, see ``StudyRunner.scored_rows``.
    """
    made, results = COMPARISONS[name], Results.of(rows)
    note = (
        "Accuracy in percent, median over the seeds; the test loss is the negative log-likelihood of a "
        "response token in nats, mean over seeds and tasks. Differences are of means over seeds and "
        "tasks, paired by task, seed and test row, in points of accuracy, in nats and in percent of the "
        "other's loss, each with a 95 % interval from a bootstrap over seeds and test rows. The dev loss "
        "is in nats per response token."
    )
    terms = converged_terms(study) if made.converged else _short_terms(study)
    said = routes(results)
    parts = [
        f"# {name}: {made.title}",
        "\n".join([*_terms(study), *terms, f"- {seeds} seeds"]),
        note,
        made.render(results, study, directory),
        *(["## Routes", ROUTES_NOTE, said] if said else []),
        "## Tuning",
        *tuning_tables(made.plan(study, 1, chosen), study, chosen),
    ]
    return "\n\n".join(parts) + "\n"


def _terms(study: Study) -> list[str]:
    """The terms of all cells."""
    train, data = study.base.train, study.base.data
    bilevel = [label for label, s in study.methods.items() if build_method(s).theta == "bilevel"]
    every = {label: study.coefficient_every.get(label, train.coefficient_every) for label in bilevel}
    said = ", ".join(f"{label} every {count}" for label, count in every.items())
    return [
        f"- base `{Path(study.base.model.path).name}`, {len(study.tasks)} tasks: {', '.join(study.tasks)}",
        "- a seed gives every method the same rows in the same order; AdamW, warm-up "
        f"{train.warmup_share:.0%}, linear decay; rows of at most {data.max_length} tokens; greedy decoding",
        f"- trained on dev rows too, bi-level, with steps between two such updates: {said}; their dev losses "
        "are in part those of training rows",
        f"- tunable parameters within {study.tolerance:.0%} of {study.reference}'s",
        *([] if study.generate else [NOT_GENERATED]),
    ]


def _short_terms(study: Study) -> list[str]:
    """The terms of all cells of the short budget."""
    train = study.base.train
    mixed = study.mixed_steps or train.max_steps
    return [
        "- short budget, the same for all methods and not enough for any to converge: "
        f"{train.max_steps} steps of {train.batch_size} rows on a single task, {mixed} on the mix; "
        f"best of the dev evaluations every {train.eval_every} steps",
        f"- learning rate of each method from {', '.join(f'{r:g}' for r in study.learning_rates)} by mean "
        f"dev loss over the tasks, with seed {study.tuning_seed}, which no table uses",
    ]


def _table1(results: Results, study: Study, directory: Path) -> str:
    places = results.places()
    plot_bars(directory / "table1.png", results, places, "each task by itself")
    return comparison(results, study.subject, places, counts=True) + "\n\n![](table1.png)"


def _table2(results: Results, study: Study, directory: Path) -> str:
    plot_bars(
        directory / "table2_mixed.png", results, results.places(mixed=True), "trained on the mix of tasks"
    )
    parts = [
        mixing(results),
        "Trained on each task by itself:",
        comparison(results, study.subject, results.places(mixed=False), counts=True),
        "Trained on the mix:",
        comparison(results, study.subject, results.places(mixed=True), counts=True),
        "![](table2_mixed.png)",
    ]
    return "\n\n".join(parts)


def _table5(results: Results, study: Study, directory: Path) -> str:
    places = results.places()
    plot_bars(directory / "table5.png", results, places, "ablations of the router")
    return comparison(results, study.subject, places, counts=False) + "\n\n![](table5.png)"


def _curve(
    name: str,
    axis: str,
    points: Callable[[Results], dict[str, list[tuple[str, str]]]],
    own: Callable[[str, AdapterSection], str],
) -> Callable[[Results, Study, Path], str]:
    """Make the report of a curve over one setting; every value is compared with the study's own.

    Args:
      own: returns the name of the variant with the subject's own setting, from its label and settings.
    """

    def make(results: Results, study: Study, directory: Path) -> str:
        places = results.places()
        plot_lines(directory / f"{name}.png", results, places, points(results), axis)
        variant = own(study.subject, full_settings(build_method(study.methods[study.subject])))
        # A rehearsal may have left it out.
        subject = variant if variant in results.variants else results.variants[0]
        return comparison(results, subject, places, counts=True) + f"\n\n![]({name}.png)"

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


COMPARISONS = {
    "table1": Comparison("all methods, each task by itself", plans.table1, _table1),
    "table2": Comparison("single tasks against their mix", plans.table2, _table2),
    "table5": Comparison("ablations of the router", plans.table5, _table5),
    "figure2": Comparison("share of each expert, per layer and task", plans.figure2, _figure2),
    "figure3": Comparison(
        "active experts k",
        plans.figure3,
        _curve(
            "figure3",
            "k, experts of a layer in force",
            _by_value,
            lambda _, settings: plans.BY_K.format(settings.top_k),
        ),
    ),
    "figure4": Comparison(
        "weight lambda of the load-balance term",
        plans.figure4,
        _curve(
            "figure4",
            "lambda",
            _by_value,
            lambda _, settings: plans.BY_LAMBDA.format(settings.load_balance),
        ),
    ),
    "figure5": Comparison(
        "rank",
        plans.figure5,
        _curve(
            "figure5", "rank", _by_rank, lambda label, settings: plans.BY_RANK.format(label, settings.rank)
        ),
    ),
    "defaults": Comparison("what the paper leaves open", plans.defaults, _defaults),
    "converged": Comparison("trained to convergence", plans.converged, render_converged, converged=True),
    "routing": Comparison("does routing pay?", plans.routing, render_routing, converged=True),
}
"""The comparisons by name."""
