"""Reports of the comparisons of converged methods, and of what was chosen for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from milora_jax.evaluation.statistics import Difference, Sample, paired_difference
from milora_jax.evaluation.study.cells import Cell
from milora_jax.evaluation.study.forced import FORCED
from milora_jax.evaluation.study.plans import RANDOM_MASK, RANDOM_ROUTER
from milora_jax.evaluation.study.plots import plot_bars
from milora_jax.evaluation.study.rows import ROUTED, RowScores, exact_sample, loss_sample
from milora_jax.evaluation.study.settings import MIXED, Budget, Study
from milora_jax.evaluation.study.tables import (
    Place,
    Results,
    comparison,
    markdown,
    mixing,
    percent,
    said,
    tuned,
)
from milora_jax.evaluation.study.tuning import SINGLE, Chosen, at_the_edge, keys_of

ALONE, TOGETHER = "Trained on each task by itself:", "Trained on the mix:"


def converged_terms(study: Study) -> list[str]:
    """The terms of all converged cells."""
    terms = study.converged
    if terms is None:
        return []

    def said_of(budget: Budget) -> str:
        return (
            f"up to {budget.max_steps} steps of {budget.batch_size} rows, a dev evaluation every "
            f"{budget.eval_every}, the best of which is kept, and an end after {budget.patience} without a "
            "better one"
        )

    others = [label for label in study.methods if label not in terms.methods]
    tasks = ", ".join(terms.tuned_on or study.alone)
    rates, scales = (
        ", ".join(f"{value:g}" for value in grid) for grid in (terms.learning_rates, terms.scales)
    )
    return [
        f"- a single task: {said_of(terms.single)}; the mix: {said_of(terms.mixed)}",
        f"- by dev loss, for every method alike: first the learning rate from {rates} with alpha = rank, "
        f"then alpha over rank from {scales} at that rate; for single tasks on {tasks}, for the mix on "
        f"itself; {terms.tuning_seeds} run(s) each, with seeds from {study.tuning_seed} "
        "on, which no table uses",
        f"- not trained to convergence, compared with the short budget alone: {', '.join(others) or 'none'}",
    ]


def render_converged(results: Results, study: Study, directory: Path) -> str:
    """Report each task by itself, the mix, one against the other, and how the runs ended."""
    single, mixed = results.places(mixed=False), results.places(mixed=True)
    plot_bars(directory / "converged_single.png", results, single, "converged, each task by itself")
    plot_bars(directory / "converged_mixed.png", results, mixed, "converged, on the mix of tasks")
    parts = [
        ALONE,
        comparison(results, study.subject, single, counts=True),
        TOGETHER,
        comparison(results, study.subject, mixed, counts=True),
        "One against the other:",
        mixing(results),
        "How the runs ended:",
        ends(results, single, mixed),
        "![](converged_single.png)",
        "![](converged_mixed.png)",
    ]
    return "\n\n".join(parts)


def ends(results: Results, single: Sequence[Place], mixed: Sequence[Place]) -> str:
    """Report whether runs converged: steps, best step, and how many stopped early."""
    head = ["variant", "trained on", "steps, median", "best step, median", "stopped early"]
    body = []
    for variant in results.variants:
        for where, places in ((SINGLE, single), (MIXED, mixed[:1])):
            rows = [row for place in places for row in results.by_variant[variant][place]]
            rows = [row for row in rows if "diverged" not in row]
            if rows:
                medians = [f"{np.median([row[name] for row in rows]):.0f}" for name in ("steps", "best_step")]
                body.append(
                    [variant, where, *medians, f"{sum(r['stopped_early'] for r in rows)} of {len(rows)}"]
                )
    return markdown(head, body)


def render_routing(results: Results, study: Study, directory: Path) -> str:
    """Report the trained subject under other routes than its own, and adapters that learned no route."""
    del directory
    subject = study.subject
    parts = [
        "Routing pays where another route is worse: a higher loss, with an interval above 0. In the first "
        "table of each pair the adapter is the same and each of its routes is replaced; in the second the "
        f"adapters were trained without learning a route: `{RANDOM_ROUTER}`, routers that stay as they "
        f"began, whose routes differ between prompts; `{RANDOM_MASK}`, one random set of experts per layer "
        "for all prompts. `exact` is the share of outputs that greedy decoding writes token for token.",
    ]
    for heading, mixed in ((ALONE, False), (TOGETHER, True)):
        places = results.places(mixed=mixed)
        given = [
            name
            for name in FORCED
            if all(name in row["scores"] for p in places for row in results.by_variant[subject][p])
        ]
        parts += [
            heading,
            _against(
                results,
                places,
                (subject, ROUTED),
                [(subject, name) for name in given],
                "route",
                study.forced_rows,
            ),
            _against(
                results,
                places,
                (subject, ROUTED),
                [(v, ROUTED) for v in (RANDOM_ROUTER, RANDOM_MASK)],
                "trained",
            ),
        ]
    return "\n\n".join(parts)


def _against(
    results: Results,
    places: Sequence[Place],
    own: tuple[str, str],
    others: Sequence[tuple[str, str]],
    what: str,
    rows: int = 0,
) -> str:
    """Losses and exact outputs of variants under routes, and their differences from those of ``own``, on the
    first rows of each task; 0 is all of them."""

    def samples(which: tuple[str, str], sample: Callable[[Sequence[RowScores]], Sample]) -> dict[str, Sample]:
        return results.samples(which[0], places, sample, which[1], rows)

    def difference(which: tuple[str, str], sample: Callable[[Sequence[RowScores]], Sample]) -> Difference:
        return paired_difference(samples(which, sample), samples(own, sample))

    body = []
    for which in (own, *others):
        loss, exact = (
            np.mean([each.mean for each in samples(which, sample).values()])
            for sample in (loss_sample, exact_sample)
        )
        name = which[1] if what == "route" else which[0]
        if which == own:
            body.append([name, f"{loss:.3f}", "", "", "", f"{exact:.1f}", ""])
            continue
        losses = difference(which, loss_sample)
        points = said(difference(which, exact_sample).absolute)
        verdict = "yes" if losses.absolute.low > 0 else "no" if losses.absolute.high < 0 else "cannot be told"
        body.append(
            [
                name,
                f"{loss:.3f}",
                said(losses.absolute, 3),
                percent(losses.relative),
                verdict,
                f"{exact:.1f}",
                points,
            ]
        )
    head = [what, "test loss", "higher by, nats", "in percent", "worse", "exact, percent", "more by, points"]
    return markdown(head, body)


def tuning_tables(cells: Sequence[Cell], study: Study, chosen: Chosen) -> list[str]:
    """Report what was chosen for some cells, and from what."""
    labels, keys = keys_of(cells)
    parts = []
    losses = {label: chosen.rate_losses[label] for label in labels if label in chosen.rate_losses}
    if losses:
        parts += [
            "Learning rates of the short budget, by mean dev loss over the tasks in nats per response token:",
            tuned(losses, study.learning_rates),
        ]
    if keys and study.converged is not None:
        names = {key: f"{key[0]}, {key[1]}" for key in keys}
        rates, scales = (
            {names[key]: losses[key] for key in keys if key in losses}
            for losses in (chosen.converged_rate_losses, chosen.scale_losses)
        )
        if rates:
            parts += [
                "Learning rates of the converged runs at alpha = rank, by dev loss in nats per token:",
                tuned(rates, study.converged.learning_rates),
            ]
        if scales:
            parts += ["alpha over rank at that learning rate:", tuned(scales, study.converged.scales)]
        parts += ["Chosen:", _chosen(keys, chosen)]
    return parts


def _chosen(keys: Sequence[tuple[str, str]], chosen: Chosen) -> str:
    body = []
    for key in keys:
        point = chosen.points[key]
        rate_edge = at_the_edge(point.learning_rate, chosen.converged_rate_losses.get(key, {}))
        scale_edge = point.scale is not None and at_the_edge(point.scale, chosen.scale_losses.get(key, {}))
        edges = [name for name, edge in (("learning rate", rate_edge), ("scale", scale_edge)) if edge]
        scale = "" if point.scale is None else f"{point.scale:g}"
        body.append([key[0], key[1], f"{point.learning_rate:g}", scale, ", ".join(edges)])
    return markdown(["method", "trained on", "learning rate", "alpha over rank", "at the edge"], body)
