"""Accuracy, loss and measures of free text as JSON, predictions as JSONL, in the protocol of LLM-Adapters.

``--workdir RUN`` scores the best adapter of a run of ``train.py``, ``--adapter EXPORT --base DIR`` an
exported one, ``--base DIR`` a plain model. ``--data FILE`` names rows, ``--task NAME`` a task of
LLM-Adapters, whose rows come from the Hub unless ``--data`` gives them. Run the same command to resume.
docs/evaluation.md has the protocol and the formats of the files.

Other commands, each with --help: ``study`` compares methods, ``lm-eval`` runs tasks of
lm-evaluation-harness, ``mt-bench`` answers and judges MT-Bench, ``routing`` draws the experts that prompts
choose.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from milora_jax.addresses import local_path
from milora_jax.cluster import Cluster
from milora_jax.commands.command_line import Parser
from milora_jax.commands.lm_eval import main as lm_eval
from milora_jax.commands.mt_bench import main as mt_bench
from milora_jax.commands.options import CLUSTER_OPTIONS, add_mesh_options, settings_of
from milora_jax.commands.routing import main as routing
from milora_jax.commands.study import main as study
from milora_jax.config import DTYPES, EvalSection
from milora_jax.console import Console
from milora_jax.data.sources import parse_given, parse_sources
from milora_jax.errors import UserError, require
from milora_jax.evaluation.own_metric import read_metric
from milora_jax.evaluation.plan import (
    Plan,
    answer_missing,
    questions_of,
    read_rows,
    result_of,
    score_responses,
)
from milora_jax.evaluation.predictions import PredictionFile
from milora_jax.evaluation.report import loss_notes, score_table
from milora_jax.evaluation.score import losses_in, with_metric
from milora_jax.evaluation.subject import Named, named_subject, read_subject
from milora_jax.evaluation.tasks import MOST_BEAMS, PAPER_BEAMS, TASKS, Task, task_named
from milora_jax.parallel.processes import (
    from_first,
    is_first,
    package_versions,
    require_same,
    together,
    watch_for_preemption_of_any,
)
from milora_jax.prompt_format import TEMPLATES
from milora_jax.storage.mirror import local_copy, synced

COMMANDS = {"study": study, "lm-eval": lm_eval, "mt-bench": mt_bench, "routing": routing}
"""Commands by name; without one of them, answers are scored."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options of scoring."""
    parser = Parser(
        prog="python -m milora_jax.evaluation",
        description=__doc__,
    )
    add = parser.add_argument
    add("--workdir", type=local_copy, help="workdir of train.py, or its gs:// address")
    add("--adapter", type=local_copy, help="exported adapter, also hf://OWNER/NAME, beside --base")
    add("--base", help="of the base: Hugging Face directory, hf://OWNER/NAME, or gs://BUCKET/PATH")
    add("--no-adapter", action="store_true", help="score the base without the adapter")
    add("--data", default="", help="[NAME=]FILE,... to score (default: the run's test files, or the Hub)")
    add("--columns", default="", help="[NAME:]FIELD=COLUMN,... of the rows of --data, see docs/data.md")
    add("--task", default="", help=f"of {', '.join(task.name for task in TASKS)}; several with commas")
    add("--limit", type=int, default=0, help="rows scored per task (default: all)")
    beams = f"1 is greedy (default), the paper has {PAPER_BEAMS}, LLM-Adapters {MOST_BEAMS}"
    add("--beams", type=int, default=1, help=f"width of the beam search: {beams}")
    add("--strict", action="store_true", help="read answers by the strict rules, see docs/evaluation.md")
    add("--metric", default="", help="FILE.py:FUNCTION, a measure of your own (default: the run's)")
    add("--max-new-tokens", type=int, default=0, help="longest answer (default: the task's, or the run's)")
    add("--batch-size", type=int, default=0, help="prompts decoded together (default: the run's)")
    add("--template", choices=TEMPLATES, help="of prompts (default: the run's or the export's, else alpaca)")
    add("--dtype", choices=DTYPES, help="of the base (default: the run's, or float32)")
    add("--predictions", type=local_path, help="JSONL file (default: WORKDIR/evaluation[-base][-TASK].jsonl)")
    add("--fresh", action="store_true", help="begin again, whatever the predictions file holds")
    add_mesh_options(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Score answers, or run the command that the first argument names."""
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in COMMANDS:
        COMMANDS[given[0]](given[1:])
    else:
        score(parse_arguments(given))


def score(asked: argparse.Namespace) -> None:
    """Score the rows that the predictions file lacks, batch by batch, and print the result as JSON."""
    with together(settings_of(Cluster, asked)), watch_for_preemption_of_any() as preempted:
        _score(asked, Console(silent=not is_first()), preempted)


def _score(asked: argparse.Namespace, console: Console, preempted: Callable[[], bool]) -> None:
    require(1 <= asked.beams <= MOST_BEAMS, "--beams", asked.beams, f"1 to {MOST_BEAMS}")
    tasks = [task_named(name.strip()) for name in asked.task.split(",") if name.strip()]
    named = named_subject(
        asked.workdir,
        asked.adapter,
        asked.base,
        template=asked.template,
        otherwise=TEMPLATES[0],  # the protocol's template, whatever the tokenizer has
        dtype=asked.dtype,
        plain=asked.no_adapter,
    )
    run = named.eval or EvalSection()
    metric = read_metric(asked.metric or run.metric)
    settings = EvalSection(
        limit=asked.limit,
        batch_size=asked.batch_size or run.batch_size,
        max_new_tokens=asked.max_new_tokens or run.max_new_tokens,
    )

    def longest(task: Task | None) -> int:
        # A task has its protocol's limit; a run's own rows are scored as in train.py.
        if task is None or asked.max_new_tokens or (named.eval is not None and not tasks):
            return settings.max_new_tokens
        return task.max_new_tokens

    path = predictions_path(asked, named, tasks)
    sources = parse_given(asked.data, asked.columns) or ([] if tasks else named.tests)
    rows = read_rows(tasks, sources, console.log)
    questions = questions_of(rows, asked.strict, asked.limit, longest, console.log)
    plan = Plan.of(read_subject(named), questions, asked.beams, settings.batch_size)
    require_same(lambda: {**package_versions(), **plan.settings()})
    mesh = plan.subject.mesh(asked.mesh, plan.batch_size)
    with (
        synced(asked.workdir),
        PredictionFile(path, plan.settings(), plan.batches(), asked.fresh) as file,
    ):
        load = functools.cache(lambda: plan.subject.load(mesh))
        answer_missing(plan, file, load, console, preempted)
        losses = losses_in(file.result or {})
        if not from_first(bool(losses)):
            losses = score_responses(plan, load(), console, preempted)
        if not is_first():
            return
        scores = [plan.measured(each, losses) for each in file.scores()]
        scores = with_metric(scores, metric, {task: each.records for task, each in questions.items()}, path)
        result = result_of(scores, plan, metric)
        file.finish(result)
    print(json.dumps(result))
    for line in loss_notes(result):
        console.log(line)
    console.log(f"\n{score_table(scores)}\n\npredictions: {path}\nnext: {next_command(asked, named)}")


def predictions_path(asked: argparse.Namespace, named: Named, tasks: Sequence[Task]) -> Path:
    """The path of the predictions, different for each subject and task.

    Raises:
      UserError: its directory does not exist.
    """
    path = asked.predictions
    if path is None:
        names = [task.name for task in tasks] or [source.name for source in parse_sources(asked.data)]
        parts = ["evaluation", *([] if named.adapter else ["base"]), *names]
        path = (asked.workdir or Path()) / f"{'-'.join(parts)}.jsonl"
    if not path.parent.is_dir():
        raise UserError(f"--predictions {str(path)!r}: no such directory as {str(path.parent)!r}")
    return path


def next_command(asked: argparse.Namespace, named: Named) -> str:
    """The command that is probably wanted next: all rows, then the base without the adapter."""
    if asked.limit:
        return f"{_command({**vars(asked), 'limit': 0, 'fresh': True})}    # all rows"
    if named.adapter is not None:
        return f"{_command({**vars(asked), 'no_adapter': True, 'predictions': None})}    # the base alone"
    source = ["--workdir", str(asked.workdir)] if asked.workdir else ["--base", named.base]
    return f"{shlex.join(['python', '-m', 'milora_jax.generation', *source])} --prompt '...'"


def _command(values: dict[str, Any]) -> str:
    """This command with other options."""
    words = ["python", "-m", "milora_jax.evaluation"]
    for name, value in values.items():
        if not value or (name, value) == ("beams", 1) or name in CLUSTER_OPTIONS:
            continue
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(words)
