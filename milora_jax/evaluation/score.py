"""Scores of generated answers and of given outputs, task by task."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from milora_jax.adapters.protocol import Adapter
from milora_jax.base.attention import DeviceLayout
from milora_jax.base.modules import Base
from milora_jax.config import EvalSection
from milora_jax.data.records import Record
from milora_jax.data.tokens import encode_question
from milora_jax.errors import UserError
from milora_jax.evaluation.extraction import Rule
from milora_jax.evaluation.free_text import TextMeasures, references_of, text_measures
from milora_jax.evaluation.loss import Loss
from milora_jax.evaluation.own_metric import OwnMetric
from milora_jax.evaluation.statistics import Interval, wilson_interval
from milora_jax.evaluation.tasks import rule_for
from milora_jax.generation.text import Answer, generate
from milora_jax.model_config import ModelConfig
from milora_jax.prompt_format import PromptFormat
from milora_jax.storage.files import write_atomic
from milora_jax.types import LETTERS

PREFILL_ROWS = 8
"""Number of prompts prefilled together on one device."""


def prefill_rows(layout: DeviceLayout | None) -> int:
    """Number of prompts prefilled together: every device gets as many as the others, on more devices than
    :data:`PREFILL_ROWS` one each."""
    size = 1 if layout is None or layout.mesh is None else layout.mesh.size
    return size * max(1, PREFILL_ROWS // size)


CompactRoute = list[dict[str, float]]
"""For each layer, the letters of the experts that the prompt chose, with their weights."""


@dataclass(frozen=True)
class Prediction:
    """One scored row: a line of the predictions file.

    Attributes:
      row: number of the row in the task's file, from 0.
      gold: the right answer; None where the row has none.
      generated: the text that the model generated.
      rule: name of the rule that read the answer, see ``evaluation.extraction``.
      extracted: the answer that the rule read; "" where it found none.
      unread: whether the rule found none; such a row counts as wrong.
      correct: whether the answer is right; None where the row has none to compare it with.
      route: the prompt's route; None without a router.
      references: references of the row; a line without any has no such field.
    """

    task: str
    row: int
    instruction: str
    gold: str | None
    generated: str
    rule: str
    extracted: str
    unread: bool
    correct: bool | None
    route: CompactRoute | None
    references: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TaskScore:
    """The result of one task.

    Attributes:
      loss: loss on the rows' outputs; None where it was not computed.
      text: measures of the answers as free text; None where they are not free text, or were not measured.
      metric: the measure of ``eval.metric``; None without one.
    """

    task: str
    predictions: list[Prediction]
    loss: Loss | None = None
    text: TextMeasures | None = None
    metric: float | None = None

    @property
    def correct(self) -> int:
        """Number of rows with a right answer."""
        return sum(bool(prediction.correct) for prediction in self.predictions)

    @property
    def answered(self) -> bool:
        """Whether the task's rows have answers; all have some, or none has."""
        return any(prediction.correct is not None for prediction in self.predictions)

    @property
    def unread(self) -> int:
        """Number of rows in whose answer the rule found nothing."""
        return sum(prediction.unread for prediction in self.predictions)

    @property
    def accuracy(self) -> float | None:
        """Share of correct rows, 0 to 1; None where the rows have no answers."""
        return self.correct / len(self.predictions) if self.answered else None

    @property
    def interval(self) -> Interval | None:
        """The accuracy and its Wilson interval; None where the rows have no answers."""
        return wilson_interval(self.correct, len(self.predictions)) if self.answered else None

    @property
    def expert_share(self) -> np.ndarray | None:
        """Share of the prompts that chose each expert, ``[L, E]``; None without a router."""
        routes = [prediction.route for prediction in self.predictions if prediction.route is not None]
        if not routes:
            return None
        chosen = [[[letter in layer for letter in LETTERS] for layer in route] for route in routes]
        return np.mean(chosen, axis=0)


def compact_route(route: np.ndarray) -> CompactRoute:
    """Compact a route ``[L, E]`` to its chosen experts, with weights to six decimals.

    >>> compact_route(np.array([[0, 0, 1.0, 0, 0, 0, 0.25]]))
    [{'V': 1.0, 'D': 0.25}]
    """
    return [
        {letter: round(float(w), 6) for letter, w in zip(LETTERS, layer, strict=True) if w} for layer in route
    ]


def judge(task: str, row: int, record: Record, rule: Rule, answer: Answer) -> Prediction:
    """Extract the answer of a row and compare it with the gold one."""
    extracted = rule.extract(answer.text)
    return Prediction(
        task=task,
        row=row,
        instruction=record.instruction,
        gold=record.answer if record.answered else None,
        generated=answer.text,
        rule=rule.name,
        extracted=extracted,
        unread=not extracted,
        correct=rule.matches(extracted, record.answer) if record.answered else None,
        route=None if answer.route is None else compact_route(answer.route),
        references=list(record.references),
    )


def limited(records: list[Record], limit: int) -> list[Record]:
    """The first ``limit`` records; 0 means all."""
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
    prompt_format: PromptFormat,
    prefill_rows: int = 1,
    layout: DeviceLayout | None = None,
    progress: Callable[[int], None] | None = None,
) -> TaskScore:
    """Generate an answer to every record and compare what the task's rule extracts with the gold.

    Args:
      base, adapter: both in the decode layout, for speed.
      settings: limit, batch size and longest answer.
      prompt_format: the format of the adapter's training.
      layout: of rows and heads over several devices, see ``generate``.
    """
    rule = rule_for(task, [record.answer for record in records])
    records = limited(records, settings.limit)
    answers = generate(
        base,
        config,
        tokenizer,
        [encode_question(tokenizer, record, prompt_format) for record in records],
        adapter=adapter,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        prefill_rows=prefill_rows,
        layout=layout,
        progress=progress,
    )
    pairs = enumerate(zip(records, answers, strict=True))
    return TaskScore(task, [judge(task, row, record, rule, answer) for row, (record, answer) in pairs])


def measures_of(predictions: Sequence[Prediction], records: Sequence[Record]) -> TextMeasures:
    """Measure the answers to records of free text, see ``evaluation.free_text``."""
    return text_measures([each.generated for each in predictions], list(map(references_of, records)))


def with_metric(
    scores: Sequence[TaskScore],
    metric: OwnMetric | None,
    tests: Mapping[str, Sequence[Record]],
    kept: Path,
) -> list[TaskScore]:
    """Add the user's own measure to scores.

    Args:
      tests: the records of each task, of which the first were asked.
      kept: the file that keeps the answers if the measure fails, for the error.

    Raises:
      UserError: see :meth:`OwnMetric.value`.
    """
    if metric is None:
        return list(scores)
    found = []
    for score in scores:
        records = tests[score.task][: len(score.predictions)]
        texts = [each.generated for each in score.predictions]
        try:
            found.append(replace(score, metric=metric.value(score.task, texts, records)))
        except UserError as error:
            raise UserError(f"{error}; the answers are kept in {kept}") from None
    return found


def accuracies(scores: Sequence[TaskScore]) -> dict[str, float]:
    """Accuracy by task, and their unweighted mean as ``mean``; without tasks whose rows have no answers."""
    if "mean" in {score.task for score in scores}:
        raise UserError("a task must not be called 'mean'")
    by_task = {score.task: score.accuracy for score in scores if score.accuracy is not None}
    if not by_task:
        return {}
    return {**by_task, "mean": sum(by_task.values()) / len(by_task)}


def figures(scores: Sequence[TaskScore]) -> dict[str, Any]:
    """The scores as JSON: for each figure a value by task.

    ``accuracy`` includes the mean over tasks, as :func:`accuracies`; ``loss`` and ``perplexity`` are null
    where nothing could be scored, or where they are not finite; ``loss_rows`` has the number of their rows
    and tokens; ``measures`` has the tasks of free text only; ``metric`` is there with an ``eval.metric``, and
    ``without_answers`` names the tasks whose rows have none, where there are any.
    """
    losses = {score.task: score.loss for score in scores if score.loss is not None}
    without = [score.task for score in scores if not score.answered]
    measured = {score.task: score.metric for score in scores if score.metric is not None}
    return {
        "accuracy": accuracies(scores),
        "loss": {task: loss.mean for task, loss in losses.items()},
        "perplexity": {task: loss.perplexity for task, loss in losses.items()},
        "loss_rows": {
            task: {"scored": loss.scored, "tokens": loss.tokens, "left_out": dict(loss.left_out)}
            for task, loss in losses.items()
        },
        "measures": {score.task: asdict(score.text) for score in scores if score.text is not None},
        **({"metric": measured} if measured else {}),
        **({"without_answers": without} if without else {}),
    }


def losses_in(figures: Mapping[str, Any]) -> dict[str, Loss]:
    """The losses in the result of :func:`figures`, by task."""
    rows = figures.get("loss_rows", {})
    return {task: Loss(mean=figures["loss"][task], **rows[task]) for task in rows}


def prediction_line(prediction: Prediction) -> str:
    """A line of the predictions file, without the line break."""
    values = asdict(prediction)
    if not prediction.references:
        del values["references"]
    return json.dumps(values, ensure_ascii=False)


def write_predictions(path: Path, scores: Sequence[TaskScore]) -> None:
    """Write one JSON object per line and scored row."""
    lines = [prediction_line(prediction) + "\n" for score in scores for prediction in score.predictions]
    write_atomic(path, "".join(lines).encode())
