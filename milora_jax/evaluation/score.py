"""Accuracy of generated answers, task by task."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from milora_jax.adapters.protocol import Adapter
from milora_jax.base.modules import Base
from milora_jax.config import EvalSection
from milora_jax.data.records import Record
from milora_jax.data.tokens import encode_question
from milora_jax.errors import UserError
from milora_jax.evaluation.extraction import rule_for
from milora_jax.generation.text import generate
from milora_jax.model_config import ModelConfig
from milora_jax.storage.files import write_atomic
from milora_jax.types import Batch


@dataclass(frozen=True)
class Prediction:
    """One scored row."""

    task: str
    instruction: str
    gold: str
    generated: str
    extracted: str
    correct: bool


@dataclass(frozen=True)
class TaskScore:
    """One task's result.

    Attributes:
      accuracy: share of correct rows, 0 to 1.
      expert_share: share of the prompts that chose each expert, ``[L, E]``; None without a router.
    """

    task: str
    accuracy: float
    predictions: list[Prediction]
    expert_share: np.ndarray | None


def limited(records: list[Record], limit: int) -> list[Record]:
    """The first ``limit`` records; all of them where it is 0."""
    return records[:limit] if limit else records


def score_task(
    base: Base,
    config: ModelConfig,
    tokenizer: Any,
    adapter: Adapter | None,
    task: str,
    records: list[Record],
    settings: EvalSection,
    *,
    template: str = "alpaca",
    prefill_rows: int = 1,
    place: Callable[[Batch], Batch] = jax.device_put,
    progress: Callable[[int], None] | None = None,
) -> TaskScore:
    """Generate an answer to every record and compare what the task's rule extracts with the gold.

    Args:
      base, adapter: decoding is fastest with both in the decode layout.
      settings: limit, batch size, longest answer.
      template: that the adapter was trained with, one of ``config.TEMPLATES``.
    """
    rule = rule_for(task, [record.answer for record in records])
    records = limited(records, settings.limit)
    answers = generate(
        base,
        config,
        tokenizer,
        [encode_question(tokenizer, record, template) for record in records],
        adapter=adapter,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        prefill_rows=prefill_rows,
        place=place,
        progress=progress,
    )
    predictions = []
    for record, answer in zip(records, answers, strict=True):
        extracted = rule.extract(answer.text)
        correct = rule.matches(extracted, record.answer)
        predictions.append(
            Prediction(task, record.instruction, record.answer, answer.text, str(extracted), correct)
        )
    routes = [answer.route for answer in answers if answer.route is not None]
    share = np.mean([route != 0 for route in routes], axis=0) if routes else None
    accuracy = sum(p.correct for p in predictions) / len(predictions)
    return TaskScore(task, accuracy, predictions, share)


def accuracies(scores: list[TaskScore]) -> dict[str, float]:
    """Accuracy by task, and their unweighted mean as ``mean``."""
    by_task = {score.task: score.accuracy for score in scores}
    if "mean" in by_task:
        raise UserError("a task must not be called 'mean'")
    return {**by_task, "mean": sum(by_task.values()) / len(by_task)}


def write_predictions(path: Path, scores: list[TaskScore]) -> None:
    """One JSON object a line, one per scored row."""
    lines = [
        json.dumps(asdict(prediction), ensure_ascii=False) + "\n"
        for score in scores
        for prediction in score.predictions
    ]
    write_atomic(path, "".join(lines).encode())
