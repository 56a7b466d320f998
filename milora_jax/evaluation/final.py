"""The evaluations before and after a training run, and its report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from milora_jax.adapters.inputs import Shape
from milora_jax.adapters.protocol import Adapter, Method
from milora_jax.adapters.registry import adapter_shape, build_method
from milora_jax.base.modules import Base
from milora_jax.base.transformer import adapter_decode_layout
from milora_jax.console import Console
from milora_jax.data.prompts import shown_prompt
from milora_jax.data.records import Record, fingerprint
from milora_jax.errors import NothingLearnedError, UserError
from milora_jax.evaluation.free_text import is_free_text, require_text_packages
from milora_jax.evaluation.loss import Loss, Responses, encode_responses, response_loss
from milora_jax.evaluation.next_steps import next_steps
from milora_jax.evaluation.own_metric import OwnMetric
from milora_jax.evaluation.report import (
    answers_side_by_side,
    figures_table,
    loss_notes,
    plot_health,
    plot_routing,
)
from milora_jax.evaluation.score import (
    TaskScore,
    figures,
    limited,
    measures_of,
    prefill_rows,
    score_task,
    with_metric,
    write_predictions,
)
from milora_jax.evaluation.tasks import require_golds, rule_for
from milora_jax.parallel.processes import (
    from_first,
    is_first,
    place,
    require_same,
    wait_for_all,
)
from milora_jax.preemption import stop_if_preempted
from milora_jax.storage.adapters import read_adapter
from milora_jax.storage.checkpoint import read_metadata
from milora_jax.storage.files import read_json, write_json_atomic
from milora_jax.training.loop import Fit
from milora_jax.training.prepare import Run
from milora_jax.training.workdir import METRICS_NAME
from milora_jax.types import EXPERTS

BASE_SCORES_NAME = "base_accuracy.json"

PREDICTIONS_NAME = "predictions.jsonl"

NO_ANSWERS = ("mesh", "metric")
"""Settings of ``eval`` on which no answer depends."""

SHOWN = 5
"""Answers to a task of free text that are printed, before and after training side by side."""


def evaluate_base(
    run: Run,
    workdir: Path,
    console: Console,
    preempted: Callable[[], bool],
    metric: OwnMetric | None = None,
) -> dict[str, dict[str, Any]]:
    """Figures of the frozen base on the test records, see ``score.figures``, and as ``answers`` its first few
    to each task; the workdir stores them for a resumed run, whose first process alone gets them.

    Args:
      preempted: called after every batch; returns whether to stop.
      metric: the user's own measure, of ``eval.metric``.
    """
    if not run.tests:
        return {}
    key = {
        "tests": {task: fingerprint(records) for task, records in run.tests.items()},
        "base": run.base_fingerprint,
        "end_tokens": sorted(run.model.eos_ids),
        "eval": {
            name: value for name, value in run.config.to_dict()["eval"].items() if name not in NO_ANSWERS
        },
        "prompt_format": run.config.prompt_format.to_dict(),
        **({} if metric is None else {"metric": [metric.given, metric.digest]}),
    }
    path = workdir / BASE_SCORES_NAME
    saved = read_json(path) if is_first() and path.is_file() else {}
    # A file of an earlier version lacks some of the figures.
    if from_first(saved.pop("key", None) == key and "answers" in saved):
        return saved
    scores = _score_all(run, None, "the base", console, preempted)
    scores = _with_metric(run, scores, metric, workdir / "base_predictions.jsonl")
    answers = {score.task: [each.generated for each in score.predictions[:SHOWN]] for score in scores}
    found = {**figures(scores), "answers": answers}
    if is_first():
        write_json_atomic(path, {"key": key, **found})
    return found


def evaluate_adapter(
    run: Run,
    workdir: Path,
    console: Console,
    preempted: Callable[[], bool],
    metric: OwnMetric | None = None,
) -> list[TaskScore]:
    """Scores of the best adapter, which is read from the disk as a user would.

    Args:
      preempted: called after every batch; returns whether to stop.
      metric: the user's own measure, of ``eval.metric``.
    """
    if not run.tests:
        return []
    wait_for_all("best adapter")  # the first process seals it
    adapter, metadata = read_adapter(workdir)
    require_same(lambda: {"best adapter": metadata})
    scores = _score_all(run, adapter, "the adapter", console, preempted)
    return _with_metric(run, scores, metric, workdir / PREDICTIONS_NAME)


def _with_metric(run: Run, scores: list[TaskScore], metric: OwnMetric | None, kept: Path) -> list[TaskScore]:
    """Add the user's own measure; if it fails, the answers are kept in a file."""
    try:
        return with_metric(scores, metric, run.tests, kept)
    except UserError:
        if is_first():
            write_predictions(kept, scores)
        raise


def _score_all(
    run: Run, adapter: Adapter | None, what: str, console: Console, preempted: Callable[[], bool]
) -> list[TaskScore]:
    """Compute the losses, which take little of the time, and then the answers."""
    base = run.decoding_base()
    tests = {task: limited(records, run.config.eval.limit) for task, records in run.tests.items()}
    responses = {
        task: encode_responses(run.tokenizer, records, run.model, run.config.prompt_format)
        for task, records in tests.items()
    }
    outputs = sum(len(each.passages) for each in responses.values())
    with _advancing(f"computing the loss of {what}", outputs, console, preempted) as advance:
        losses = response_losses(run, base, adapter, responses, advance)
    questions = sum(map(len, tests.values()))
    with _advancing(f"scoring {what}", questions, console, preempted) as advance:
        scores = score_tests(run, base, adapter, advance)
    return [
        dataclasses.replace(
            score,
            loss=losses[score.task],
            text=measures_of(score.predictions, tests[score.task]) if _free_text(run, score.task) else None,
        )
        for score in scores
    ]


@contextmanager
def _advancing(
    title: str, total: int, console: Console, preempted: Callable[[], bool]
) -> Iterator[Callable[[int], None]]:
    """A function that takes a number of finished rows, shows progress, and stops if that was requested."""
    with console.progress(title, total, "rows") as bar:

        def advance(rows: int) -> None:
            bar.advance(rows)
            stop_if_preempted(preempted, title)

        yield advance


def _free_text(run: Run, task: str) -> bool:
    records = run.tests[task]
    return is_free_text(rule_for(task, [record.answer for record in records]), records)


def response_losses(
    run: Run,
    base: Base,
    adapter: Adapter | None,
    responses: Mapping[str, Responses],
    advance: Callable[[int], None],
) -> dict[str, Loss]:
    """The loss on the outputs of every test task of a run; the arguments are as in :func:`score_tests`.

    Args:
      responses: the encoded outputs, by task.
    """
    adapter = None if adapter is None else for_decoding(base, adapter)
    rows = run.config.eval.batch_size
    return {
        task: response_loss(base, run.model, adapter, each, rows, layout=run.layout, advance=advance)
        for task, each in responses.items()
    }


def score_tests(
    run: Run,
    base: Base,
    adapter: Adapter | None,
    advance: Callable[[int], None] | None = None,
    tests: Mapping[str, list[Record]] | None = None,
) -> list[TaskScore]:
    """Answer and score every test task of a run.

    Args:
      base: the run's base, in the decode layout.
      adapter: an adapter from the disk, which is put on the run's devices here.
      advance: called with the number of rows each time some are answered.
      tests: records by task; None for the run's.
    """
    adapter = None if adapter is None else for_decoding(base, adapter)
    return [
        score_task(
            base,
            run.model,
            run.tokenizer,
            adapter,
            task,
            records,
            run.config.eval,
            prompt_format=run.config.prompt_format,
            prefill_rows=prefill_rows(run.layout),
            layout=run.layout,
            progress=advance,
        )
        for task, records in (run.tests if tests is None else tests).items()
    ]


def for_decoding(base: Base, adapter: Adapter) -> Adapter:
    """Put an adapter from the disk on the base's devices, in the decode layout."""
    return adapter_decode_layout(place(adapter, base.everywhere), base)


def check_tests(tests: Mapping[str, list[Record]], log: Callable[[str], None]) -> None:
    """Check the test rows before training, and log what is unusual about the answers of rows that have the
    name of a task of LLM-Adapters.

    Raises:
      UserError: the task's rule can read none of them, or free text needs a package that is missing.
    """
    for task, records in tests.items():
        golds = [record.answer for record in records]
        rule = rule_for(task, golds)
        if unusual := require_golds(task, golds, rule):
            log(f"note: {unusual}")
        if is_free_text(rule, records):
            require_text_packages()


class ParameterCounts(NamedTuple):
    """The parameters of one adapter: tunable ones, and those used per generated token."""

    tunable: int
    active: float


def parameter_counts(method: Method, shape: Shape, best: Mapping[str, Any]) -> ParameterCounts:
    """Tunable parameters of the best adapter, and those used per generated token.

    Args:
      best: its metadata; ``expert_share`` is ``[L, E]``, the share of dev prompts that chose each expert, or
        None without a router.
    """
    share = best["expert_share"]
    means = np.ones(len(EXPERTS)) if share is None else np.mean(share, axis=0)
    tunable, by_expert = best["tunable_parameters"], dict(zip(EXPERTS, means.tolist(), strict=True))
    return ParameterCounts(tunable, method.active_parameters(shape, by_expert, tunable))


def write_report(
    run: Run,
    workdir: Path,
    fit: Fit,
    before: dict[str, dict[str, Any]],
    scores: list[TaskScore],
    wall_seconds: float,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Print the tables and example answers; write ``summary.json``, ``predictions.jsonl`` and the plot.

    Args:
      before: the result of :func:`evaluate_base`.
      scores: scores of the best adapter.
      wall_seconds: time of this start, plus the training time of the earlier ones.
      say: prints a text.

    Returns:
      The content of ``summary.json``.
    """
    best = read_metadata(workdir / "best", fit.progress.best_step)
    counts = parameter_counts(build_method(run.config.adapter), adapter_shape(run.model), best)
    summary = {
        "steps": fit.steps,
        "best_step": fit.progress.best_step,
        "dev_perplexity": best["dev_perplexity"],
        **({"dev_loss": best["dev_loss"]} if run.config.train.prefers else {}),
        **({"dev_answers": best["dev_answers"]} if run.dev_tests else {}),
        "skipped_updates": fit.progress.skipped,
        "not_learned": fit.progress.unlearned(run.guess, run.measure) or None,
        "tunable_parameters": counts.tunable,
        "mean_active_parameters": counts.active,
        "tokens_per_second": fit.tokens_per_second,
        "wall_seconds": wall_seconds,
    }
    after = figures(scores) if scores else {}
    written = ["summary.json", METRICS_NAME]
    if plot_health(workdir / "routing_health.png", workdir / METRICS_NAME):
        written.append("routing_health.png")
    if scores:
        for name in (
            "accuracy",
            "loss",
            "perplexity",
            "measures",
            *(["metric"] if "metric" in after else []),
        ):
            summary[name] = {"base": before[name], "adapter": after[name]}
        if "without_answers" in after:
            summary["without_answers"] = after["without_answers"]
        summary["loss_rows"] = after["loss_rows"]  # base and adapter are scored on the same rows
        write_predictions(workdir / PREDICTIONS_NAME, scores)
        written.append(PREDICTIONS_NAME)
        if plot_routing(workdir / "routing.png", scores):
            written.append("routing.png")
    write_json_atomic(workdir / "summary.json", summary)
    # Everything is written before anything is printed, which may fail.
    if scores:
        say(_example(run, scores[0]))
        for score in scores:
            if score.text is not None:
                answers = before["answers"][score.task]
                say(answers_side_by_side(run.tests[score.task], answers, score.predictions))
        say("\n".join([figures_table(before, after), *loss_notes(after)]))
    say(
        f"\n{fit.steps} steps, best at {fit.progress.best_step} ({_dev_figures(run, summary)}), "
        f"{summary['tunable_parameters']:,} tunable parameters, "
        f"{summary['mean_active_parameters']:,.0f} active per token, {wall_seconds:.0f} s"
    )
    say("\n".join(next_steps(workdir, run.config, run.model, written)))
    reason = fit.progress.saturated(run.guess)
    if summary["not_learned"] and not reason:  # else require_learned says so
        say(f"warning: nothing was learned: {summary['not_learned']}")
    elif reason and not summary["not_learned"]:
        best = fit.progress.best_step
        say(f"warning: training broke down after step {best}, whose adapter is the best: {reason}")
    return summary


def _dev_figures(run: Run, summary: Mapping[str, Any]) -> str:
    """What chose the best step, and its dev loss."""
    loss = summary["dev_loss" if run.config.train.prefers else "dev_perplexity"]
    text = f"{run.measure} {loss:.3f}"
    if not run.dev_tests:
        return text
    name = "dev accuracy" if run.config.train.best_by == "accuracy" else "dev metric"
    return f"{name} {summary['dev_answers']:.3f}, {text}"


def require_learned(run: Run, fit: Fit) -> None:
    """Raise an error if a run has certainly learned nothing; everything is written by then.

    Every process of a run decides alike, and must be done with the others before it calls this.

    Raises:
      NothingLearnedError: no evaluation was better than the first, and the last one is no better than a
        guess.
    """
    if fit.progress.saturated(run.guess) and (reason := fit.progress.unlearned(run.guess, run.measure)):
        raise NothingLearnedError(
            f"nothing was learned: {reason}; summary.json says so too, lower train.learning_rate"
        )


def _example(run: Run, score: TaskScore) -> str:
    record, written = run.tests[score.task][0], run.config.prompt_format
    prompt = shown_prompt(run.tokenizer, record, written)
    return f"\nprompt:\n{prompt}\nanswer:\n{score.predictions[0].generated}\n"
