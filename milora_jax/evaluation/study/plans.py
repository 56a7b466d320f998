"""Which cells each table and figure of the paper asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from milora_jax.adapters.registry import build_method, full_settings
from milora_jax.config import AdapterSection
from milora_jax.errors import require
from milora_jax.evaluation.study.cells import Cell, make_cell
from milora_jax.evaluation.study.settings import MIXED, Study

ABLATIONS: dict[str, dict[str, str]] = {
    "average pooling": {"pooler": "mean"},
    "last token": {"pooler": "last"},
    "GELU": {"activation": "gelu"},
    "ReLU then GELU": {"activation": "relu-gelu"},
    "GELU then ReLU": {"activation": "gelu-relu"},
    "joint coefficients": {"coefficients": "joint"},
    "frozen coefficients": {"coefficients": "frozen"},
}
"""Table 5 (MiLoRA-1 to -5), and the ways to train the coefficients of Appendix A."""

BY_K, BY_LAMBDA, BY_RANK = "k={}", "lambda={:g}", "{} r={}"
"""Names of the variants of Figures 3, 4 and 5."""

Rates = dict[str, float]
"""Learning rate by method label."""


def tuning(study: Study, labels: Sequence[str]) -> dict[str, dict[float, list[Cell]]]:
    """For each method and learning rate of the grid one run per task, looked at on dev only."""
    return {
        label: {
            rate: [
                make_cell(
                    study,
                    label,
                    label,
                    study.methods[label],
                    task,
                    study.tuning_seed,
                    rate,
                    scored=False,
                )
                for task in study.tasks
            ]
            for rate in study.learning_rates
        }
        for label in labels
    }


def _grid(
    study: Study,
    variants: dict[str, tuple[str, AdapterSection]],
    data: Sequence[str],
    seeds: int,
    rates: Rates,
) -> list[Cell]:
    """Every variant on every set of rows with every seed, seed by seed."""
    return [
        make_cell(study, variant, label, settings, trained_on, seed, rates[label])
        for seed in range(seeds)
        for trained_on in data
        for variant, (label, settings) in variants.items()
    ]


def _varied(study: Study, changes: dict[str, dict]) -> dict[str, tuple[str, AdapterSection]]:
    """The subject with one setting changed at a time."""
    subject = study.methods[study.subject]
    return {
        variant: (study.subject, dataclasses.replace(subject, **change))
        for variant, change in changes.items()
    }


def table1(study: Study, seeds: int, rates: Rates) -> list[Cell]:
    """All methods, each task by itself."""
    variants = {label: (label, settings) for label, settings in study.methods.items()}
    return _grid(study, variants, study.tasks, seeds, rates)


def table2(study: Study, seeds: int, rates: Rates) -> list[Cell]:
    """Some methods on each task by itself and on the mix of all."""
    variants = {label: (label, study.methods[label]) for label in study.mixed_methods}
    return _grid(study, variants, (*study.tasks, MIXED), seeds, rates)


def table5(study: Study, seeds: int, rates: Rates) -> list[Cell]:
    """The subject and its ablations."""
    variants = _varied(study, {study.subject: {}, **ABLATIONS})
    return _grid(study, variants, study.varied_tasks, seeds, rates)


def figure2(study: Study, seeds: int, rates: Rates) -> list[Cell]:
    """The subject on the mix of all tasks, for its shares of experts per layer and task."""
    variants = {study.subject: (study.subject, study.methods[study.subject])}
    return _grid(study, variants, (MIXED,), seeds, rates)


def figure3(study: Study, seeds: int, rates: Rates) -> list[Cell]:
    """The subject over k."""
    variants = _varied(study, {BY_K.format(k): {"top_k": k} for k in study.top_ks})
    return _grid(study, variants, study.varied_tasks, seeds, rates)


def figure4(study: Study, seeds: int, rates: Rates) -> list[Cell]:
    """The subject over lambda."""
    variants = _varied(study, {BY_LAMBDA.format(value): {"load_balance": value} for value in study.lambdas})
    return _grid(study, variants, study.varied_tasks, seeds, rates)


def figure5(study: Study, seeds: int, rates: Rates) -> list[Cell]:
    """The subject and the reference over the rank."""
    variants = {}
    for label in (study.subject, study.reference):
        settings = full_settings(build_method(study.methods[label]))
        require(settings.rank is not None, "study method", label, "one with a rank, for figure5")
        for rank in sorted({*study.ranks, settings.rank or 0}):
            variants[BY_RANK.format(label, rank)] = (label, dataclasses.replace(settings, rank=rank))
    return _grid(study, variants, study.varied_tasks, seeds, rates)


def defaults(study: Study, seeds: int, rates: Rates) -> list[Cell]:
    """The subject with each choice that the paper leaves open: looked at on dev only, with seeds that no
    table uses, and each choice at every learning rate of the grid, since it may want its own."""
    choices = {
        f"{gate}, {'normalised' if normalize else 'as it is'}": {"gate": gate, "normalize": normalize}
        for gate in study.gates
        for normalize in (True, False)
    }
    cells = []
    for seed in range(study.tuning_seed, study.tuning_seed + seeds):
        for trained_on in study.varied_tasks:
            for variant, (label, settings) in _varied(study, choices).items():
                for rate in study.learning_rates:
                    name = f"{variant} @ {rate:g}"
                    cells.append(
                        make_cell(study, name, label, settings, trained_on, seed, rate, scored=False)
                    )
            for factor in study.router_rates:
                cells.append(
                    make_cell(
                        study,
                        f"router rate x {factor:g}",
                        study.subject,
                        study.methods[study.subject],
                        trained_on,
                        seed,
                        rates[study.subject],
                        scored=False,
                        router_rate=factor,
                    )
                )
    return cells
