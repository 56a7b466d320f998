"""The cells of each table and figure of the paper."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from milora_jax.adapters.registry import build_method, full_settings
from milora_jax.config import AdapterSection
from milora_jax.errors import UserError, require
from milora_jax.evaluation.study.cells import Cell, make_cell
from milora_jax.evaluation.study.settings import MIXED, Converged, Study
from milora_jax.evaluation.study.starts import FIXED
from milora_jax.evaluation.study.tuning import Chosen, scaled, where_of

ABLATIONS: dict[str, dict[str, str]] = {
    "average pooling": {"pooler": "mean"},
    "last token": {"pooler": "last"},
    "GELU": {"activation": "gelu"},
    "ReLU then GELU": {"activation": "relu-gelu"},
    "GELU then ReLU": {"activation": "gelu-relu"},
    "joint coefficients": {"coefficients": "joint"},
    "frozen coefficients": {"coefficients": "frozen"},
}
"""Table 5 (MiLoRA-1 to -5), and the ways to train the coefficients in Appendix A."""

BY_K, BY_LAMBDA, BY_RANK = "k={}", "lambda={:g}", "{} r={}"
"""Names of the variants of Figures 3, 4 and 5."""

RANDOM_MASK, RANDOM_ROUTER = "random mask, kept", "random router, kept"
"""Variants of the subject in ``routing`` without a learned route: one random set of experts per layer for all
prompts; and routers that are not trained, whose routes differ between prompts."""


def _grid(
    study: Study,
    variants: dict[str, tuple[str, AdapterSection]],
    data: Sequence[str],
    seeds: int,
    chosen: Chosen,
) -> list[Cell]:
    """Make a cell for every variant, set of rows and seed, seed by seed."""
    return [
        make_cell(study, variant, label, settings, trained_on, seed, chosen.rates[label])
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


def table1(study: Study, seeds: int, chosen: Chosen) -> list[Cell]:
    """Cells of all methods, each task by itself."""
    variants = {label: (label, settings) for label, settings in study.methods.items()}
    return _grid(study, variants, study.tasks, seeds, chosen)


def table2(study: Study, seeds: int, chosen: Chosen) -> list[Cell]:
    """Cells of some methods, on each task by itself and on the mix of all."""
    variants = {label: (label, study.methods[label]) for label in study.mixed_methods}
    return _grid(study, variants, (*study.tasks, MIXED), seeds, chosen)


def table5(study: Study, seeds: int, chosen: Chosen) -> list[Cell]:
    """Cells of the subject and its ablations."""
    variants = _varied(study, {study.subject: {}, **ABLATIONS})
    return _grid(study, variants, study.varied_tasks, seeds, chosen)


def figure2(study: Study, seeds: int, chosen: Chosen) -> list[Cell]:
    """Cells of the subject on the mix of all tasks, for its shares of experts per layer and task."""
    require(study.generate, "study generate", study.generate, "True, for figure2: answers tell the shares")
    variants = {study.subject: (study.subject, study.methods[study.subject])}
    return _grid(study, variants, (MIXED,), seeds, chosen)


def figure3(study: Study, seeds: int, chosen: Chosen) -> list[Cell]:
    """Cells of the subject over k."""
    variants = _varied(study, {BY_K.format(k): {"top_k": k} for k in study.top_ks})
    return _grid(study, variants, study.varied_tasks, seeds, chosen)


def figure4(study: Study, seeds: int, chosen: Chosen) -> list[Cell]:
    """Cells of the subject over lambda."""
    variants = _varied(study, {BY_LAMBDA.format(value): {"load_balance": value} for value in study.lambdas})
    return _grid(study, variants, study.varied_tasks, seeds, chosen)


def figure5(study: Study, seeds: int, chosen: Chosen) -> list[Cell]:
    """Cells of the subject and the reference over the rank."""
    variants = {}
    for label in (study.subject, study.reference):
        settings = full_settings(build_method(study.methods[label]))
        require(settings.rank is not None, "study method", label, "one with a rank, for figure5")
        for rank in sorted({*study.ranks, settings.rank or 0}):
            variants[BY_RANK.format(label, rank)] = (label, dataclasses.replace(settings, rank=rank))
    return _grid(study, variants, study.varied_tasks, seeds, chosen)


def defaults(study: Study, seeds: int, chosen: Chosen) -> list[Cell]:
    """Cells of the subject with each choice that the paper leaves open, on dev rows only, with seeds that no
    table uses, and at every learning rate of the grid, because each choice may need its own."""
    cells = []
    for seed in range(study.tuning_seed, study.tuning_seed + seeds):
        for trained_on in study.varied_tasks:
            for variant, (label, settings) in _varied(study, {"as it is": {}, **study.choices}).items():
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
                        chosen.rates[study.subject],
                        scored=False,
                        router_rate=factor,
                    )
                )
    return cells


def converged(study: Study, seeds: int, chosen: Chosen) -> list[Cell]:
    """Cells of some methods to convergence, on each task by itself and on the mix of all."""
    terms = _terms(study)
    variants = {label: study.methods[label] for label in terms.methods}
    return [
        _converged(study, terms, chosen, label, label, settings, trained_on, seed)
        for seed in range(seeds)
        for trained_on in (*study.alone, MIXED)
        for label, settings in variants.items()
    ]


def routing(study: Study, seeds: int, chosen: Chosen) -> list[Cell]:
    """Cells of the subject to convergence, and with routes that are not learned."""
    terms, label = _terms(study), study.subject
    subject = study.methods[label]
    routes = getattr(build_method(subject), "routes", False)
    require(routes, "study subject", label, "a method that routes, for routing")
    still = {"pooler": "mean", "coefficients": "frozen", "feature_window": 0.0}
    variants: dict[str, tuple[AdapterSection, float, bool]] = {
        label: (subject, 1.0, False),
        RANDOM_ROUTER: (dataclasses.replace(subject, **still), 0.0, False),
        RANDOM_MASK: (dataclasses.replace(subject, **FIXED), 0.0, True),
    }
    return [
        _converged(study, terms, chosen, variant, label, settings, trained_on, seed, rate, mask)
        for seed in range(seeds)
        for trained_on in (*study.alone, MIXED)
        for variant, (settings, rate, mask) in variants.items()
    ]


def _terms(study: Study) -> Converged:
    if study.converged is None:
        raise UserError("the study has no 'converged': expected its terms, as in configs/study_tiny.py")
    return study.converged


def _converged(
    study: Study,
    terms: Converged,
    chosen: Chosen,
    variant: str,
    label: str,
    settings: AdapterSection,
    trained_on: str,
    seed: int,
    router_rate: float = 1.0,
    fixed_mask: bool = False,
) -> Cell:
    """Make a converged cell with its method's choices; the subject is also scored under forced routes."""
    point = chosen.points[label, where_of(trained_on)]
    return make_cell(
        study,
        variant,
        label,
        scaled(settings, point.scale),
        trained_on,
        seed,
        point.learning_rate,
        router_rate=router_rate,
        converged=terms,
        forced=variant == study.subject and build_method(settings).routes,
        fixed_mask=fixed_mask,
    )
