"""``python -m milora_jax.evaluation mt-bench answer|judge``: MT-Bench with a tuned model.

``answer --workdir DIR --questions FILE --out ANSWERS`` answers FastChat's ``question.jsonl``.
``judge --answers ANSWERS --judge-url URL --judge-model NAME --out JUDGMENTS`` has another model grade them,
or with ``--against ANSWERS`` compare them with another model's. Run the same command to resume either.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from milora_jax.addresses import local_path
from milora_jax.commands.command_line import Parser
from milora_jax.config import DTYPES
from milora_jax.console import Console
from milora_jax.errors import UserError, require
from milora_jax.evaluation.judge import grade_tasks, judge, pair_tasks, summary
from milora_jax.evaluation.judge_client import JudgeClient
from milora_jax.evaluation.mt_bench import Asked, answer_questions, read_answers, read_questions
from milora_jax.evaluation.subject import named_subject, read_subject
from milora_jax.prompt_format import TEMPLATES
from milora_jax.storage.mirror import local_copy


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the options."""
    parser = Parser(
        prog="python -m milora_jax.evaluation mt-bench",
        description=__doc__,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    answer = commands.add_parser("answer", help="answer the questions")
    answer.add_argument("--workdir", default="", help="workdir of train.py")
    answer.add_argument("--base", default="", help="instead: a model's directory or name")
    answer.add_argument("--adapter", default="", help="with --base: an exported adapter; default: none")
    answer.add_argument("--dtype", choices=DTYPES, default="", help="default: the run's, or float32")
    answer.add_argument(
        "--template", choices=TEMPLATES, default="", help="default: the run's, or chat where there is one"
    )
    answer.add_argument("--questions", type=local_path, required=True, help="FastChat's question.jsonl")
    answer.add_argument("--out", type=local_path, required=True, help="JSONL file of the answers")
    answer.add_argument(
        "--model-id", default="", help="name in the answers; default: the workdir's, adapter's or base's"
    )
    answer.add_argument("--max-new-tokens", type=int, default=1024, help="longest answer")
    answer.add_argument("--temperature", type=float, help="default: each category's, as FastChat has them")
    answer.add_argument("--seed", type=int, default=0, help="of the sampling")
    answer.add_argument("--batch-size", type=int, default=8, help="answers written together")
    grading = commands.add_parser("judge", help="have the answers judged")
    grading.add_argument(
        "--answers", type=local_path, required=True, help="JSONL file that `answer` has written"
    )
    grading.add_argument("--against", type=local_path, help="another model's answers: compare, not grade")
    grading.add_argument("--judge-url", required=True, help="of OpenAI's API: http://HOST:PORT/v1")
    grading.add_argument("--judge-model", required=True, help="the judge's name there")
    grading.add_argument(
        "--key-variable", default="", help="environment variable with the key; default: no key"
    )
    grading.add_argument("--out", type=local_path, required=True, help="JSONL file of the judgments")
    grading.add_argument("--parallel", type=int, default=4, help="requests at a time")
    grading.add_argument("--timeout", type=float, default=120.0, help="seconds without an answer")
    grading.add_argument("--attempts", type=int, default=4, help="how often a request is sent at most")
    grading.add_argument("--wait", type=float, default=2.0, help="seconds before the second; then doubled")
    grading.add_argument("--max-tokens", type=int, default=1024, help="longest judgment")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Answer the questions, or have the answers judged."""
    asked = parse_arguments(arguments)
    if not asked.out.parent.is_dir():
        raise UserError(f"--out {str(asked.out)!r}: no such directory as {str(asked.out.parent)!r}")
    if asked.command == "answer":
        _answer(asked)
    else:
        _judge(asked)


def _answer(asked: argparse.Namespace) -> None:
    require(asked.batch_size >= 1, "--batch-size", asked.batch_size, "at least 1")
    require(asked.max_new_tokens >= 1, "--max-new-tokens", asked.max_new_tokens, "at least 1")
    questions = read_questions(asked.questions)
    sampling = Asked(asked.max_new_tokens, asked.temperature, asked.seed)
    for question in questions:
        sampling.settings(question, asked.max_new_tokens)  # checked before the base is loaded
    named = named_subject(
        asked.workdir and local_copy(asked.workdir),
        asked.adapter and local_copy(asked.adapter),
        asked.base,
        template=asked.template,
        dtype=asked.dtype,
    )
    subject = read_subject(named)
    model_id = asked.model_id or Path(asked.workdir or asked.adapter or asked.base).name
    console, model = Console(), subject.load()
    with console.progress("answering", len(questions), "questions") as bar:
        answer_questions(
            model,
            subject.identity(),
            questions,
            sampling,
            model_id,
            asked.out,
            asked.batch_size,
            bar.advance,
        )
    console.log(f"wrote {asked.out}")


def _judge(asked: argparse.Namespace) -> None:
    require(asked.parallel >= 1, "--parallel", asked.parallel, "at least 1")
    key = ""
    if asked.key_variable:
        key = os.environ.get(asked.key_variable, "")
        require(bool(key), f"--key-variable {asked.key_variable}", key, "a variable that holds the key")
    client = JudgeClient(
        asked.judge_url,
        asked.judge_model,
        key,
        asked.timeout,
        asked.attempts,
        asked.wait,
        asked.max_tokens,
    )
    ours = read_answers(asked.answers)
    tasks = grade_tasks(ours)
    if asked.against:
        tasks = pair_tasks(ours, read_answers(asked.against))
    console = Console()
    with closing(client), console.progress("judging", len(tasks), "judgments") as bar:
        judgments = judge(tasks, client, asked.out, asked.parallel, bar.advance)
    found = summary(judgments, ours[0].model_id)
    if found["unreadable"]:
        console.log(f"{found['unreadable']} judgments have no verdict and count for nothing: see {asked.out}")
    print(json.dumps(found))
