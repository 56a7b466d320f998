"""Every table and figure of the paper: which cells it asks for, and how it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from milora_jax.adapters.registry import build_method, full_settings
from milora_jax.config import AdapterSection
from milora_jax.errors import require
from milora_jax.evaluation.study import plans
from milora_jax.evaluation.study.cells import Cell, Row
from milora_jax.evaluation.study.plans import Rates
from milora_jax.evaluation.study.plots import plot_bars, plot_lines, plot_shares
from milora_jax.evaluation.study.settings import Study
from milora_jax.evaluation.study.tables import Results, comparison, dev_only, mixing, tuned


@dataclass(frozen=True)
class Comparison:
    """A table or figure.

    Attributes:
      title: in a few words.
      plan: ``(study, seeds, rates)`` to the cells.
      render: ``(results, study, directory)`` to Markdown; draws its plots into the directory.
    """

    title: str
    plan: Callable[[Study, int, Rates], list[Cell]]
    render: Callable[[Results, Study, Path], str]


def labels_of(study: Study, names: Sequence[str]) -> list[str]:
    """The methods whose learning rate the named comparisons need."""
    nothing = dict.fromkeys(study.methods, 0.0)
    needed = {cell.method for name in names for cell in COMPARISONS[name].plan(study, 1, nothing)}
    return [label for label in study.methods if label in needed]


def report(
    name: str,
    study: Study,
    rows: Sequence[Row],
    losses: Mapping[str, Mapping[float, float]],
    seeds: int,
    directory: Path,
) -> str:
    """The Markdown of one comparison; draws its plots beside it.

    Args:
      losses: dev loss by method and learning rate, see ``StudyRunner.choose_rates``.
    """
    note = (
        "Accuracy in percent, median over the seeds. Differences are in points, paired by task and seed, "
        "with a bootstrap 95 % interval over the seeds. The dev loss is in nats per response token."
    )
    parts = [
        f"# {name}: {COMPARISONS[name].title}",
        "\n".join([*_terms(study), f"- {seeds} seeds"]),
        note,
        COMPARISONS[name].render(Results.of(rows), study, directory),
        "## Learning rates",
        "Mean dev loss over the tasks, in nats per response token.",
        tuned({label: losses[label] for label in labels_of(study, [name])}, study),
    ]
    return "\n\n".join(parts) + "\n"


def _terms(study: Study) -> list[str]:
    """What all cells share."""
    train, data = study.base.train, study.base.data
    mixed = study.mixed_steps or train.max_steps
    bilevel = [label for label, s in study.methods.items() if build_method(s).theta == "bilevel"]
    every = {label: study.coefficient_every.get(label, train.coefficient_every) for label in bilevel}
    said = ", ".join(f"{label} every {count}" for label, count in every.items())
    return [
        f"- base `{Path(study.base.model.path).name}`, {len(study.tasks)} tasks: {', '.join(study.tasks)}",
        f"- {train.max_steps} steps of {train.batch_size} rows on a single task, {mixed} on the mix; a seed "
        "gives every method the same rows in the same order",
        f"- AdamW, warm-up {train.warmup_share:.0%}, linear decay, best of the dev evaluations every "
        f"{train.eval_every} steps; rows of at most {data.max_length} tokens; greedy decoding",
        f"- learning rate of each method from {', '.join(f'{r:g}' for r in study.learning_rates)} by mean "
        f"dev loss over the tasks, with seed {study.tuning_seed}, which no table uses",
        f"- trained on dev rows too, bi-level, with steps between two such updates: {said}; their dev losses "
        "are in part those of training rows",
        f"- tunable parameters within {study.tolerance:.0%} of {study.reference}'s",
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
        mixing(results, study.subject),
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
    """How a curve over one setting reads; every value is compared with the study's own.

    Args:
      own: name of the variant that has the subject's own setting, from its label and settings.
    """

    def make(results: Results, study: Study, directory: Path) -> str:
        places = results.places()
        plot_lines(directory / f"{name}.png", results, places, points(results), axis)
        variant = own(study.subject, full_settings(build_method(study.methods[study.subject])))
        # A rehearsal may leave it out.
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
}
"""Every comparison by name."""
