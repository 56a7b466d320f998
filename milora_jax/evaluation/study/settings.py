"""The settings of a study; a file in ``configs/`` returns a :class:`Study` from ``get_study()``."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from milora_jax.columns import parse_columns
from milora_jax.config import AdapterSection, Config, DataSection, TrainSection, parse_weights
from milora_jax.config_file import call_config_file
from milora_jax.data.sources import parse_sources, run_sources
from milora_jax.errors import UserError, one_of, require

MIXED = "mixed"
"""Name of the data with the rows of all tasks."""

LETTER: dict[str, Any] = {
    "features": "raw",
    "feature_window": 0.0,
    "router_gradient": "chosen",
    "top_k_anneal": 0.0,
    "load_balance": 1e-2,
}
"""MiLoRA exactly as in the paper: the settings whose defaults differ from ``configs/paper.py``."""

QUICK_STEPS, QUICK_ROWS = 10, 20
"""Steps and rows under ``--quick``: enough to exercise every part, too few to learn from."""


@dataclass(frozen=True)
class Budget:
    """The longest duration of a run that is to converge.

    Attributes:
      max_steps: optimiser steps, over which the learning rate falls to 0.
      batch_size: rows of a step.
      eval_every: steps between two dev evaluations.
      patience: dev evaluations without improvement before the run stops.
    """

    max_steps: int
    batch_size: int
    eval_every: int
    patience: int = 10

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            require(value >= 1, f"study budget {name}", value, "at least 1")
        least = self.eval_every * (self.patience + 1)
        expected = f"at least {least}, (patience + 1) * eval_every, or no run can stop early"
        require(self.max_steps >= least, "study budget max_steps", self.max_steps, expected)

    def applied(self, train: TrainSection) -> TrainSection:
        """The training settings of a run with this budget."""
        return dataclasses.replace(train, **dataclasses.asdict(self))


@dataclass(frozen=True)
class Converged:
    """The comparison of methods that are trained until they no longer improve.

    Attributes:
      methods: labels of these methods; all others have the short budget only.
      single, mixed: budgets of a single task and of the mix.
      learning_rates: the grid from which each method's is chosen, at alpha = rank, separately for single
        tasks and for the mix; a grid of one value needs no run.
      scales: alpha over rank, chosen next at that learning rate; the first is 1.
      alone: tasks on which methods are trained separately; empty means all.
      tuned_on: those of them whose mean dev loss decides for all of them; empty means all.
      tuning_seeds: number of runs for each choice.
    """

    methods: tuple[str, ...]
    single: Budget
    mixed: Budget
    learning_rates: tuple[float, ...]
    scales: tuple[float, ...] = (1.0, 0.5, 2.0)
    alone: tuple[str, ...] = ()
    tuned_on: tuple[str, ...] = ()
    tuning_seeds: int = 1

    def __post_init__(self) -> None:
        require(
            bool(self.learning_rates), "study converged learning_rates", self.learning_rates, "at least one"
        )
        first = bool(self.scales) and self.scales[0] == 1
        require(first, "study converged scales", self.scales, "1 first: the learning rate is chosen at it")
        require(self.tuning_seeds >= 1, "study converged tuning_seeds", self.tuning_seeds, "at least 1")

    def budget(self, trained_on: str) -> Budget:
        """The budget of a task, or of the mix."""
        return self.mixed if trained_on == MIXED else self.single


@dataclass(frozen=True)
class Study:
    """The terms on which methods are compared.

    Attributes:
      base: the settings that all cells share. ``data.train``, ``data.dev`` and ``data.test`` hold one source
        per task, of the same names; the adapter is not read.
      methods: settings by label, of equal tunable parameters.
      reference: the label whose number of parameters is the budget.
      tolerance: largest relative distance from the budget.
      learning_rates: the grid from which each method's is chosen by dev perplexity.
      coefficient_ratio: learning rate of a bi-level Theta over that of Omega (the paper: 1e-6 / 1e-4).
      converged: the terms of methods that are trained to convergence; everything else has the budget of
        ``base.train`` and ``mixed_steps``. None where no comparison needs it.
      tuning_seed: first seed of the runs that choose; above every seed of the tables.
      coefficient_every: values of ``train.coefficient_every`` for some methods, by label.
      mixed_steps: optimiser steps where the rows of all tasks are mixed.
      mixed_methods: labels of Table 2.
      generate: whether the test rows are answered by generation; otherwise a row is right where greedy
        decoding would write its output token for token, which the likelihood tells.
      forced_rows: test rows of each task, from the first, that are scored under routes other than their own,
        each as expensive as scoring them once; 0 is all of them.
      subject: label of the method that is varied in Table 5 and Figures 2 to 5, and whose routes are replaced
        in ``routing``.
      varied_tasks: tasks of Table 5 and Figures 3 to 5.
      top_ks, lambdas: values of Figures 3 and 4.
      ranks: values of Figure 5, beside the subject's own.
      choices: settings of the subject by name, changed one choice at a time among the open ones.
      router_rates: learning rates of the routers, as multiples, among the open choices.
      quick_tasks: tasks of a rehearsal; those of equal length share compiled programs.
    """

    base: Config
    methods: dict[str, AdapterSection]
    reference: str = "lora"
    tolerance: float = 0.03
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    coefficient_ratio: float = 1e-2
    converged: Converged | None = None
    tuning_seed: int = 1000
    coefficient_every: dict[str, int] = field(default_factory=dict)
    mixed_steps: int = 0
    mixed_methods: tuple[str, ...] = ("lora", "dora", "moelora", "milora")
    generate: bool = True
    forced_rows: int = 0
    subject: str = "milora"
    varied_tasks: tuple[str, ...] = ()
    top_ks: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7)
    lambdas: tuple[float, ...] = (0.0, 1e-3, 1e-2, 1e-1, 1.0)
    ranks: tuple[int, ...] = (8, 16, 64)
    choices: dict[str, dict[str, Any]] = field(default_factory=dict)
    router_rates: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    quick_tasks: tuple[str, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the sources."""
        return tuple(source.name for source in parse_sources(self.base.data.train))

    def __post_init__(self) -> None:
        supervised = not self.base.train.prefers
        own = self.base.eval.metric
        require(not own, "study base.eval.metric", own, "none, a study compares accuracies and losses")
        by = self.base.train.best_by
        require(by == "loss", "study base.train.best_by", by, "'loss', by which a study chooses")
        require(supervised, "study base.train.objective", self.base.train.objective, "sft, which is scored")
        names = [[source.name for source in split] for split in run_sources(self.base.data).values()]
        require(bool(names[0]), "study base.data.train", self.base.data.train, "one source per task")
        same = all(sorted(split) == sorted(names[0]) for split in names)
        require(same, "study base.data", names, "sources of the same tasks as train, dev and test")
        require(MIXED not in names[0], "study task", MIXED, "another name, this one is the mix of all")
        for label in (self.reference, self.subject, *self.mixed_methods, *self.coefficient_every):
            one_of("study method", label, tuple(self.methods))
        for task in (*self.varied_tasks, *self.quick_tasks):
            one_of("study task", task, self.tasks)
        for name, change in self.choices.items():
            known = {each.name for each in dataclasses.fields(AdapterSection)}
            for setting in change:
                one_of(f"a setting of study choice {name!r}", setting, tuple(sorted(known)))
        if self.converged is not None:
            for label in self.converged.methods:
                one_of("study converged method", label, tuple(self.methods))
            for task in self.converged.alone:
                one_of("study converged alone", task, self.tasks)
            for task in self.converged.tuned_on:
                one_of("study converged tuned_on", task, self.alone)
            for label in (self.reference, self.subject):
                has = label in self.converged.methods
                require(has, "study converged methods", self.converged.methods, f"a list with {label!r}")
        has_subject = self.subject in self.mixed_methods
        require(has_subject, "study mixed_methods", self.mixed_methods, f"a list with {self.subject!r}")
        require(bool(self.learning_rates), "study learning_rates", self.learning_rates, "at least one")
        require(self.mixed_steps >= 0, "study mixed_steps", self.mixed_steps, "0 (as single tasks) or more")
        require(self.forced_rows >= 0, "study forced_rows", self.forced_rows, "0 (all of them) or more")

    @property
    def alone(self) -> tuple[str, ...]:
        """The tasks on which methods are trained separately to convergence."""
        return (self.converged.alone if self.converged else ()) or self.tasks

    def data_of(self, trained_on: str) -> DataSection:
        """The data of one task, or of all of them."""
        return self.base.data if trained_on == MIXED else _of_tasks(self.base.data, (trained_on,))


def _of_tasks(data: DataSection, tasks: tuple[str, ...]) -> DataSection:
    """The data of some of the tasks."""
    kept = {
        split: ",".join(f"{source.name}={source.location}" for source in sources if source.name in tasks)
        for split, sources in run_sources(data).items()
    }
    columns = [column for column in parse_columns(data.columns) if column.source in ("", *tasks)]
    weights = (f"{name}={weight!r}" for name, weight in parse_weights(data.weights).items() if name in tasks)
    return dataclasses.replace(
        data, **kept, columns=",".join(column.entry for column in columns), weights=",".join(weights)
    )


def load_study(path: Path) -> Study:
    """Load the study of a config file.

    Raises:
      UserError: the file is missing, cannot be run or defines no study.
    """
    study = call_config_file(path, "get_study", example="configs/study_tiny.py")
    if not isinstance(study, Study):
        raise UserError(f"get_study() of {str(path)!r} gives a {type(study).__name__}: expected a Study")
    return study


def narrowed(study: Study, tasks: str, methods: str) -> Study:
    """Restrict a study to some tasks and methods, given comma-separated; empty means all."""
    kept_tasks = _chosen("--tasks", tasks, study.tasks)
    kept_methods = _chosen("--methods", methods, tuple(study.methods))
    for needed in (study.reference, study.subject):
        require(needed in kept_methods, "--methods", methods, f"a list with {needed!r}, which others need")
    return dataclasses.replace(
        study,
        base=dataclasses.replace(study.base, data=_of_tasks(study.base.data, kept_tasks)),
        methods={label: study.methods[label] for label in kept_methods},
        mixed_methods=tuple(label for label in study.mixed_methods if label in kept_methods),
        coefficient_every={k: v for k, v in study.coefficient_every.items() if k in kept_methods},
        quick_tasks=tuple(task for task in study.quick_tasks if task in kept_tasks),
        converged=_narrowed(study.converged, kept_tasks, kept_methods),
        # Without any of the tasks that it varies, it varies the given ones.
        varied_tasks=tuple(task for task in study.varied_tasks if task in kept_tasks) or kept_tasks,
    )


def _narrowed(
    converged: Converged | None, tasks: Collection[str], methods: Collection[str]
) -> Converged | None:
    return converged and dataclasses.replace(
        converged,
        methods=tuple(label for label in converged.methods if label in methods),
        alone=tuple(task for task in converged.alone if task in tasks),
        tuned_on=tuple(task for task in converged.tuned_on if task in tasks),
    )


def _chosen(flag: str, text: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(filter(None, (part.strip() for part in text.split(","))))
    for name in names:
        one_of(flag, name, allowed)
    return names or allowed


def _quick(converged: Converged) -> Converged:
    budget = Budget(QUICK_STEPS, converged.single.batch_size, eval_every=QUICK_STEPS // 2, patience=1)
    return dataclasses.replace(
        converged,
        single=budget,
        mixed=budget,
        learning_rates=converged.learning_rates[:1],
        scales=converged.scales[:2],
    )


def quick(study: Study) -> Study:
    """Shorten a study to a few steps and rows: a rehearsal whose figures mean nothing."""
    train = dataclasses.replace(
        study.base.train, max_steps=QUICK_STEPS, eval_every=QUICK_STEPS, coefficient_every=5
    )
    # Rows beyond those that are answered would be padding of the same cost.
    rows = dataclasses.replace(study.base.eval, limit=QUICK_ROWS, batch_size=QUICK_ROWS)
    base = dataclasses.replace(study.base, train=train, eval=rows)
    small = dataclasses.replace(
        study,
        base=base,
        mixed_steps=QUICK_STEPS,
        learning_rates=study.learning_rates[:1],
        ranks=study.ranks[:1],
        top_ks=study.top_ks[2::4],
        lambdas=study.lambdas[2::2],
        choices=dict(list(study.choices.items())[:2]),
        router_rates=study.router_rates[:1],
        converged=study.converged and _quick(study.converged),
    )
    return narrowed(small, ",".join(study.quick_tasks or study.tasks[:2]), "")
