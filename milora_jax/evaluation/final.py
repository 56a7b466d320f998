"""The evaluations around a training run, and its report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from milora_jax.adapters.protocol import Adapter, active_parameters, tunable_parameters
from milora_jax.adapters.registry import adapter_shape, build_method
from milora_jax.base.transformer import adapter_decode_layout, decode_layout
from milora_jax.cli import Console, stop_if
from milora_jax.data.prompts import prompt_text
from milora_jax.data.records import fingerprint
from milora_jax.evaluation.report import accuracy_table, plot_routing
from milora_jax.evaluation.score import TaskScore, accuracies, limited, score_task, write_predictions
from milora_jax.parallel.rules import state_shardings
from milora_jax.storage.adapters import load_adapter
from milora_jax.storage.checkpoint import read_metadata
from milora_jax.storage.files import read_json, write_json_atomic
from milora_jax.training.loop import Fit
from milora_jax.training.prepare import Run
from milora_jax.types import EXPERTS

BASE_SCORES_NAME = "base_accuracy.json"


def evaluate_base(
    run: Run, workdir: Path, console: Console, preempted: Callable[[], bool]
) -> dict[str, float]:
    """Accuracy of the frozen base on the test records; remembered in the workdir across resumes.

    Args:
      preempted: asked after every batch whether to stop.
    """
    if not run.tests:
        return {}
    path = workdir / BASE_SCORES_NAME
    key = {
        "tests": {task: fingerprint(records) for task, records in run.tests.items()},
        "base": run.base_fingerprint,
        "eval": run.config.to_dict()["eval"],
    }
    if path.is_file() and (saved := read_json(path)).get("key") == key:
        return saved["accuracy"]
    found = accuracies(_score_all(run, None, "scoring the base", console, preempted))
    write_json_atomic(path, {"key": key, "accuracy": found})
    return found


def evaluate_adapter(
    run: Run, workdir: Path, console: Console, preempted: Callable[[], bool]
) -> list[TaskScore]:
    """Scores of the best adapter, read back from the disk as a user would read it.

    Args:
      preempted: asked after every batch whether to stop.
    """
    if not run.tests:
        return []
    return _score_all(run, load_adapter(workdir), "scoring the adapter", console, preempted)


def _score_all(
    run: Run, adapter: Adapter | None, title: str, console: Console, preempted: Callable[[], bool]
) -> list[TaskScore]:
    settings = run.config.eval
    base = decode_layout(run.base)
    if adapter is not None:
        placed: Adapter = jax.device_put(adapter, state_shardings(run.mesh, run.rules, adapter))
        adapter = adapter_decode_layout(placed)
    total = sum(len(limited(records, settings.limit)) for records in run.tests.values())
    scores = []
    with console.progress(title, total, "rows") as bar:

        def advance(rows: int) -> None:
            bar.advance(rows)
            stop_if(preempted, title)

        for task, records in run.tests.items():
            scores.append(
                score_task(
                    base,
                    run.model,
                    run.tokenizer,
                    adapter,
                    task,
                    records,
                    settings,
                    place=run.place,
                    progress=advance,
                )
            )
    return scores


def write_report(
    run: Run,
    workdir: Path,
    fit: Fit,
    before: dict[str, float],
    scores: list[TaskScore],
    wall_seconds: float,
) -> None:
    """Print the table and an example answer; write ``summary.json``, ``predictions.jsonl`` and the plot.

    Args:
      wall_seconds: of this life, and the training time of the earlier ones.
    """
    settings = run.config.adapter
    method, shape = build_method(settings), adapter_shape(run.model)
    best = read_metadata(workdir / "best", fit.progress.best_step)
    by_expert = dict(zip(EXPERTS, np.mean(best["expert_share"], axis=0).tolist(), strict=True))
    summary = {
        "steps": fit.steps,
        "best_step": fit.progress.best_step,
        "dev_perplexity": fit.progress.best_perplexity,
        "skipped_updates": fit.progress.skipped,
        "tunable_parameters": tunable_parameters(method, shape),
        "mean_active_parameters": active_parameters(method.expert_sizes(shape), by_expert),
        "tokens_per_second": fit.tokens_per_second,
        "wall_seconds": wall_seconds,
    }
    if scores:
        after = accuracies(scores)
        summary["accuracy"] = {"base": before, "adapter": after}
        write_predictions(workdir / "predictions.jsonl", scores)
        plot_routing(workdir / "routing.png", scores)
        record = next(iter(run.tests.values()))[0]
        first = scores[0].predictions[0]
        print(f"\nprompt:\n{prompt_text(record)}\nanswer:\n{first.generated}\n")
        print(accuracy_table(before, after))
    write_json_atomic(workdir / "summary.json", summary)
    print(
        f"\n{fit.steps} steps, best at {fit.progress.best_step} (dev perplexity "
        f"{fit.progress.best_perplexity:.3f}), {summary['tunable_parameters']:,} tunable parameters, "
        f"{summary['mean_active_parameters']:,.0f} active per token, {wall_seconds:.0f} s"
    )
    print(f"written to {workdir}")
