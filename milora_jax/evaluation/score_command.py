"""Accuracy, loss and measures of free text as JSON, predictions as JSONL, in the protocol of LLM-Adapters.

``--workdir RUN`` scores the best adapter of a run of ``train.py``, ``--adapter EXPORT --base DIR`` an
exported one, ``--base DIR`` a plain model. ``--data FILE`` names rows, ``--task NAME`` a task of
LLM-Adapters, whose rows come from the Hub unless ``--data`` gives them. The same command goes on where it
was stopped. docs/evaluation.md has the protocol and the formats of the files.

Other commands, each with --help: ``study`` compares methods, ``lm-eval`` runs tasks of
lm-evaluation-harness, ``mt-bench`` answers and judges MT-Bench, ``routing`` draws which experts prompts
choose.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from milora_jax.cli import Bar, Console, Parser, stop_if, stop_noted
from milora_jax.config import DTYPES, TEMPLATES, EvalSection
from milora_jax.data.records import parse_given, parse_sources
from milora_jax.errors import UserError, require
from milora_jax.evaluation.loss import Loss
from milora_jax.evaluation.plan import Plan, questions_of, read_rows
from milora_jax.evaluation.predictions import PredictionFile
from milora_jax.evaluation.report import loss_notes, score_table
from milora_jax.evaluation.score import Prediction, TaskScore, figures, losses_in
from milora_jax.evaluation.subject import Model, Named, named_subject, read_subject
from milora_jax.evaluation.tasks import MOST_BEAMS, PAPER_BEAMS, TASKS, Task, task_named


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python -m milora_jax.evaluation",
        description=__doc__,
    )
    add = parser.add_argument
    add("--workdir", type=Path, help="workdir of train.py: its base and its best adapter")
    add("--adapter", type=Path, help="exported adapter, beside --base")
    add("--base", help="of the base: Hugging Face directory, hf://OWNER/NAME, or gs://BUCKET/PATH")
    add("--no-adapter", action="store_true", help="score the base without the adapter")
    add("--data", default="", help="[NAME=]FILE,... to score (default: the run's test files, or the Hub)")
    add("--columns", default="", help="[NAME:]FIELD=COLUMN,... of the rows of --data, see docs/data.md")
    add("--task", default="", help=f"of {', '.join(task.name for task in TASKS)}; several with commas")
    add("--limit", type=int, default=0, help="rows scored per task (default: all)")
    beams = f"1 is greedy (default), the paper has {PAPER_BEAMS}, LLM-Adapters {MOST_BEAMS}"
    add("--beams", type=int, default=1, help=f"width of the beam search: {beams}")
    add("--strict", action="store_true", help="read answers by the strict rules, see docs/evaluation.md")
    add("--max-new-tokens", type=int, default=0, help="longest answer (default: the task's, or the run's)")
    add("--batch-size", type=int, default=0, help="prompts decoded together (default: the run's)")
    add("--template", choices=TEMPLATES, help="of prompts (default: the run's, or alpaca)")
    add("--dtype", choices=DTYPES, help="of the base (default: the run's, or float32)")
    add("--predictions", type=Path, help="JSONL file (default: WORKDIR/evaluation[-base][-TASK].jsonl)")
    add("--fresh", action="store_true", help="begin again, whatever the predictions file holds")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Score, batch by batch, what the predictions file does not hold yet; print the result as JSON."""
    arguments, console = parse_arguments(argv), Console()
    require(1 <= arguments.beams <= MOST_BEAMS, "--beams", arguments.beams, f"1 to {MOST_BEAMS}")
    tasks = [task_named(name.strip()) for name in arguments.task.split(",") if name.strip()]
    named = named_subject(
        arguments.workdir,
        arguments.adapter,
        arguments.base,
        template=arguments.template,
        otherwise=TEMPLATES[0],  # the protocol's, whatever a tokenizer has
        dtype=arguments.dtype,
        plain=arguments.no_adapter,
    )
    run = named.eval or EvalSection()
    given = EvalSection(
        limit=arguments.limit,
        batch_size=arguments.batch_size or run.batch_size,
        max_new_tokens=arguments.max_new_tokens or run.max_new_tokens,
    )

    def longest(task: Task | None) -> int:
        # Who names a task asks for its protocol; a run's own rows are scored as train.py has scored them.
        if task is None or arguments.max_new_tokens or (named.eval is not None and not tasks):
            return given.max_new_tokens
        return task.max_new_tokens

    path = predictions_path(arguments, named, tasks)
    sources = parse_given(arguments.data, arguments.columns) or ([] if tasks else named.tests)
    rows = read_rows(tasks, sources, console.say)
    questions = questions_of(rows, arguments.strict, arguments.limit, longest, console.say)
    plan = Plan.of(read_subject(named), questions, arguments.beams, given.batch_size)
    with (
        stop_noted() as preempted,
        PredictionFile(path, plan.settings(), plan.batches(), arguments.fresh) as file,
    ):
        load = functools.cache(plan.subject.load)
        answer_missing(plan, file, load, console, preempted)
        losses = losses_in(file.result or {}) or score_responses(plan, load(), console, preempted)
        scores = [plan.measured(score, losses) for score in file.scores()]
        result = result_of(scores, plan)
        file.finish(result)
    print(json.dumps(result))
    for line in loss_notes(result):
        console.say(line)
    console.say(f"\n{score_table(scores)}\n\npredictions: {path}\nnext: {next_command(arguments, named)}")


def predictions_path(arguments: argparse.Namespace, named: Named, tasks: Sequence[Task]) -> Path:
    """One file per thing that is scored, so that one task after the other can be.

    Raises:
      UserError: its directory does not exist.
    """
    path = arguments.predictions
    if path is None:
        names = [task.name for task in tasks] or [source.name for source in parse_sources(arguments.data)]
        parts = ["evaluation", *([] if named.adapter else ["base"]), *names]
        path = (arguments.workdir or Path()) / f"{'-'.join(parts)}.jsonl"
    if not path.parent.is_dir():
        raise UserError(f"--predictions {str(path)!r}: no such directory as {str(path.parent)!r}")
    return path


def answer_missing(
    plan: Plan,
    file: PredictionFile,
    load: Callable[[], Model],
    console: Console,
    preempted: Callable[[], bool],
) -> None:
    """Answer the missing batches, each of which is on the disk before the next one begins.

    Args:
      load: gives the model.
      preempted: asked before every batch whether to stop.
    """
    if file.done:
        console.say(f"{len(file.done)} of {plan.rows} rows are in {file.path} already")
    missing = file.missing
    if not missing:
        return
    model = load()
    with console.progress("scoring", plan.rows, "rows") as bar:
        shown = _Shown(bar, plan.rows, list(file.done.values()))
        for batch in missing:
            stop_if(preempted, f"scoring {batch.task}")
            predictions = plan.answer(model, batch)
            file.append(predictions)
            shown.answered(predictions)


def score_responses(
    plan: Plan, model: Model, console: Console, preempted: Callable[[], bool]
) -> dict[str, Loss]:
    """The loss of every task. A command that is stopped here computes all of them again: this takes a small
    part of the time of the answers.

    Args:
      preempted: asked after every batch whether to stop.
    """
    total = sum(len(responses.passages) for responses in plan.responses.values())
    with console.progress("loss", total, "rows") as bar:

        def advance(rows: int) -> None:
            bar.advance(rows)
            stop_if(preempted, "computing the loss")

        return plan.losses(model, advance)


class _Shown:
    """What the bar says: the accuracy so far; in a log also the speed, which tqdm shows itself."""

    def __init__(self, bar: Bar, rows: int, before: Sequence[Prediction]) -> None:
        self._bar, self._rows, self._before = bar, rows, len(before)
        self._done, self._correct = 0, sum(each.correct for each in before)
        self._began = time.monotonic()
        bar.advance(self._before)

    def answered(self, predictions: Sequence[Prediction]) -> None:
        """Show that these are done."""
        self._done += len(predictions)
        self._correct += sum(each.correct for each in predictions)
        reached = self._before + self._done
        status = f"{100 * self._correct / reached:.1f}% right"
        if not sys.stderr.isatty():
            rate = self._done / max(time.monotonic() - self._began, 1e-6)
            status += f", {rate:.2f} rows/s"
        self._bar.reach(reached, status)


def result_of(scores: Sequence[TaskScore], plan: Plan) -> dict[str, Any]:
    """What is printed, and kept beside the predictions."""
    return {
        **figures(scores),
        "interval": {score.task: [score.interval.low, score.interval.high] for score in scores},
        "rows": {score.task: len(score.predictions) for score in scores},
        "unread": {score.task: score.unread for score in scores},
        "rule": {task: asked.rule.name for task, asked in plan.questions.items()},
        "max_new_tokens": {task: asked.max_new_tokens for task, asked in plan.questions.items()},
        "beams": plan.beams,
    }


def next_command(arguments: argparse.Namespace, named: Named) -> str:
    """What a reader of this result is likely to want: all rows, then the base without the adapter."""
    if arguments.limit:
        return f"{_command({**vars(arguments), 'limit': 0, 'fresh': True})}    # all rows"
    if named.adapter is not None:
        return f"{_command({**vars(arguments), 'no_adapter': True, 'predictions': None})}    # the base alone"
    source = ["--workdir", str(arguments.workdir)] if arguments.workdir else ["--base", named.base]
    return f"{shlex.join(['python', '-m', 'milora_jax.generation', *source])} --prompt '...'"


def _command(values: dict[str, Any]) -> str:
    """This command with other options."""
    words = ["python", "-m", "milora_jax.evaluation"]
    for name, value in values.items():
        if not value or (name, value) == ("beams", 1):
            continue
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(words)
