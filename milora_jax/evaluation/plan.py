"""The plan of an evaluation: questions, a model and settings; and its answers, batch by batch."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from milora_jax.console import Console, ProgressBar
from milora_jax.data.records import Record, fingerprint, read_records
from milora_jax.data.scopes import EncodedPrompt
from milora_jax.data.sources import Source
from milora_jax.data.tokens import encode_question, naming, require_embedded
from milora_jax.errors import UserError
from milora_jax.evaluation.extraction import Rule
from milora_jax.evaluation.free_text import is_free_text, require_text_packages
from milora_jax.evaluation.hub import hub_records
from milora_jax.evaluation.loss import Loss, Responses, encode_responses, response_loss
from milora_jax.evaluation.own_metric import OwnMetric
from milora_jax.evaluation.predictions import PredictionFile, TaskBatch, batches_by_length
from milora_jax.evaluation.score import (
    Prediction,
    TaskScore,
    figures,
    judge,
    limited,
    measures_of,
    prefill_rows,
)
from milora_jax.evaluation.subject import Model, Subject
from milora_jax.evaluation.tasks import Task, find_task, require_golds, rule_for
from milora_jax.generation.settings import GenerationSettings
from milora_jax.generation.text import generate
from milora_jax.preemption import stop_if_preempted


@dataclass(frozen=True)
class Questions:
    """The rows of one task that are scored.

    Attributes:
      rule: the rule that reads their answers.
      max_new_tokens: longest answer in tokens.
      free_text: whether their answers are also measured as free text, see ``evaluation.free_text``.
    """

    records: list[Record]
    rule: Rule
    max_new_tokens: int
    free_text: bool


@dataclass(frozen=True)
class Plan:
    """One evaluation and its settings.

    Attributes:
      questions: by task.
      prompts: of every question, by task.
      responses: the given outputs, of which the loss is computed, by task.
      beams: width of the search; 1 is greedy.
      batch_size: number of prompts decoded together.
    """

    subject: Subject
    questions: Mapping[str, Questions]
    prompts: Mapping[str, list[EncodedPrompt]]
    responses: Mapping[str, Responses]
    beams: int
    batch_size: int

    @classmethod
    def of(cls, subject: Subject, questions: Mapping[str, Questions], beams: int, batch_size: int) -> Plan:
        """Write every question and its output in the subject's template.

        Raises:
          UserError: a prompt leaves no room for its answer, or a row cannot be written in the template.
        """
        prompts = {task: _encoded(subject, task, asked) for task, asked in questions.items()}
        responses = {
            task: encode_responses(subject.tokenizer, asked.records, subject.config, subject.prompt_format)
            for task, asked in questions.items()
        }
        return cls(subject, questions, prompts, responses, beams, batch_size)

    @property
    def rows(self) -> int:
        """Number of rows of all tasks."""
        return sum(len(asked.records) for asked in self.questions.values())

    def batches(self) -> list[TaskBatch]:
        """All rows, task by task, with similar lengths together."""
        return [
            batch
            for task, ids in self.prompts.items()
            for batch in batches_by_length(task, [len(each) for each in ids], self.batch_size)
        ]

    def settings(self) -> dict[str, Any]:
        """Everything that the predictions depend on, as JSON."""
        subject = self.subject
        return {
            **subject.identity(),
            "beams": self.beams,
            "batch_size": self.batch_size,
            "tasks": {
                task: {
                    "rows": len(asked.records),
                    "rule": asked.rule.name,
                    "max_new_tokens": asked.max_new_tokens,
                    "records": fingerprint(asked.records, subject.chat_template),
                }
                for task, asked in self.questions.items()
            },
        }

    def answer(self, model: Model, batch: TaskBatch) -> list[Prediction]:
        """Generate the answers of a batch and judge them.

        Args:
          model: the subject's model, loaded.
        """
        asked = self.questions[batch.task]
        answers = generate(
            model.base,
            model.config,
            model.tokenizer,
            [self.prompts[batch.task][row] for row in batch.rows],
            adapter=model.adapter,
            settings=GenerationSettings(max_new_tokens=asked.max_new_tokens, num_beams=self.beams),
            batch_size=self.batch_size,
            prefill_rows=prefill_rows(model.layout),
            layout=model.layout,
        )
        return [
            judge(batch.task, row, asked.records[row], asked.rule, answer)
            for row, answer in zip(batch.rows, answers, strict=True)
        ]

    def losses(self, model: Model, advance: Callable[[int], None]) -> dict[str, Loss]:
        """The loss on the given outputs, by task.

        Args:
          model: the subject's model, loaded.
          advance: called with the number of rows each time some are scored.
        """
        return {
            task: response_loss(
                model.base,
                model.config,
                model.adapter,
                responses,
                self.batch_size,
                layout=model.layout,
                advance=advance,
            )
            for task, responses in self.responses.items()
        }

    def measured(self, score: TaskScore, losses: Mapping[str, Loss]) -> TaskScore:
        """Add the loss of its task to a score, and measures of free text where the task has them."""
        asked = self.questions[score.task]
        text = measures_of(score.predictions, asked.records) if asked.free_text else None
        return dataclasses.replace(score, loss=losses[score.task], text=text)


def read_rows(
    tasks: Sequence[Task], sources: Sequence[Source], log: Callable[[str], None]
) -> dict[str, list[Record]]:
    """Read the rows to score, by the name of their task.

    Args:
      tasks: the tasks of the rows, one for each source; without ``sources`` their rows come from the Hub.
      sources: without ``tasks`` each is a task of its own name.

    Raises:
      UserError: there are none, the numbers of files and tasks differ, or a row is incomplete.
    """
    if not sources:
        if not tasks:
            raise UserError("nothing to score: give --data FILE or --task NAME")
        rows = {}
        for task in tasks:
            log(f"loading {task.name} from the Hub")
            rows[task.name] = hub_records(task)
        return rows
    names = [task.name for task in tasks] or [source.name for source in sources]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"task {twice[0]!r} is named twice: expected each once, files apart by NAME=FILE")
    if not tasks:
        return {source.name: read_records(source, scored=True) for source in sources}
    if len(sources) != len(tasks):
        raise UserError(f"--task names {len(tasks)} tasks, --data has {len(sources)} files")
    pairs = zip(tasks, sources, strict=True)
    return {
        task.name: read_records(dataclasses.replace(source, name=task.name), scored=True)
        for task, source in pairs
    }


def questions_of(
    rows: Mapping[str, list[Record]],
    strict: bool,
    limit: int,
    longest: Callable[[Task | None], int],
    log: Callable[[str], None],
) -> dict[str, Questions]:
    """The rows of every task with the rule that scores them.

    Args:
      strict: use the strict rules.
      limit: rows of each task; 0 means all.
      longest: returns the longest answer in tokens to the rows of a task of LLM-Adapters, or to others.

    Raises:
      UserError: the rows of a task belong to another, or a task is called ``mean``; or free text needs a
        package that is missing.
    """
    if "mean" in rows:
        raise UserError("a task must not be called 'mean': expected NAME=FILE with another name")
    found = {}
    for name, records in rows.items():
        golds = [record.answer for record in records]
        rule = rule_for(name, golds, strict)
        if unusual := require_golds(name, golds, rule):
            log(f"note: {unusual}")
        if free_text := is_free_text(rule, records):
            require_text_packages()
        found[name] = Questions(limited(records, limit), rule, longest(find_task(name)), free_text)
    return found


def answer_missing(
    plan: Plan,
    file: PredictionFile,
    load: Callable[[], Model],
    console: Console,
    preempted: Callable[[], bool],
) -> None:
    """Answer the missing batches; each is on the disk before the next one begins.

    Args:
      load: loads the model.
      preempted: called before every batch; returns whether to stop.
    """
    if file.done:
        console.log(f"{len(file.done)} of {plan.rows} rows are in {file.path} already")
    missing = file.missing
    if not missing:
        return
    model = load()
    with console.progress("scoring", plan.rows, "rows") as bar:
        status = _Status(bar, plan.rows, list(file.done.values()))
        for batch in missing:
            stop_if_preempted(preempted, f"scoring {batch.task}")
            predictions = plan.answer(model, batch)
            file.append(predictions)
            status.answered(predictions)


def score_responses(
    plan: Plan, model: Model, console: Console, preempted: Callable[[], bool]
) -> dict[str, Loss]:
    """The loss of every task. After a stop all of them are computed again, because this takes little time
    beside the answers.

    Args:
      preempted: called after every batch; returns whether to stop.
    """
    total = sum(len(responses.passages) for responses in plan.responses.values())
    with console.progress("loss", total, "rows") as bar:

        def advance(rows: int) -> None:
            bar.advance(rows)
            stop_if_preempted(preempted, "computing the loss")

        return plan.losses(model, advance)


class _Status:
    """Status of the progress bar: the accuracy so far, and in a log the speed, which tqdm shows itself."""

    def __init__(self, bar: ProgressBar, rows: int, before: Sequence[Prediction]) -> None:
        self._bar, self._rows, self._before = bar, rows, len(before)
        self._done, self._correct, self._judged = 0, 0, 0
        self._judge(before)
        self._began = time.monotonic()
        bar.advance(self._before)

    def answered(self, predictions: Sequence[Prediction]) -> None:
        """Show the accuracy with these predictions."""
        self._done += len(predictions)
        self._judge(predictions)
        status = [f"{100 * self._correct / self._judged:.1f}% right"] if self._judged else []
        if not sys.stderr.isatty():
            rate = self._done / max(time.monotonic() - self._began, 1e-6)
            status.append(f"{rate:.2f} rows/s")
        self._bar.reach(self._before + self._done, ", ".join(status))

    def _judge(self, predictions: Sequence[Prediction]) -> None:
        known = [each.correct for each in predictions if each.correct is not None]
        self._correct, self._judged = self._correct + sum(known), self._judged + len(known)


def result_of(scores: Sequence[TaskScore], plan: Plan, metric: OwnMetric | None = None) -> dict[str, Any]:
    """The result that is printed and stored beside the predictions.

    Args:
      metric: the user's own measure, which the scores have.
    """
    return {
        **figures(scores),
        "interval": {
            score.task: [between.low, between.high]
            for score in scores
            if (between := score.interval) is not None
        },
        "rows": {score.task: len(score.predictions) for score in scores},
        "unread": {score.task: score.unread for score in scores},
        "rule": {task: asked.rule.name for task, asked in plan.questions.items()},
        "max_new_tokens": {task: asked.max_new_tokens for task, asked in plan.questions.items()},
        "beams": plan.beams,
        **({} if metric is None else {"metric_function": metric.given}),
    }


def _encoded(subject: Subject, task: str, asked: Questions) -> list[EncodedPrompt]:
    written, room = subject.prompt_format, subject.config.max_positions - asked.max_new_tokens
    prompts = [encode_question(subject.tokenizer, record, written) for record in asked.records]
    for row, (record, prompt) in enumerate(zip(asked.records, prompts, strict=True)):
        ids = prompt.ids
        with naming(record):
            require_embedded(subject.tokenizer, ids, subject.config.vocab_size)
        if len(ids) > room:
            raise UserError(
                f"{task}: the prompt of row {row} has {len(ids)} tokens, expected at most {room} "
                f"({subject.config.max_positions} positions less --max-new-tokens {asked.max_new_tokens})"
            )
    return prompts
