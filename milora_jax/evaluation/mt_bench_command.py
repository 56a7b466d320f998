"""``python -m milora_jax.evaluation mt-bench answer|judge``: MT-Bench with a tuned model.

``answer --workdir DIR --questions FILE --out ANSWERS`` answers FastChat's ``question.jsonl``.
``judge --answers ANSWERS --judge-url URL --judge-model NAME --out JUDGMENTS`` has another model grade them,
or with ``--against ANSWERS`` compare them with another model's. Both go on where they stopped.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from milora_jax.cli import Console, Parser
from milora_jax.config import DTYPES, TEMPLATES
from milora_jax.errors import UserError, require
from milora_jax.evaluation.judge import grade_tasks, judge, pair_tasks, summary
from milora_jax.evaluation.judge_client import JudgeClient
from milora_jax.evaluation.mt_bench import Asked, answer_questions, read_answers, read_questions
from milora_jax.evaluation.subject import named_subject, read_subject


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
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
    answer.add_argument("--questions", type=Path, required=True, help="FastChat's question.jsonl")
    answer.add_argument("--out", type=Path, required=True, help="JSONL file of the answers")
    answer.add_argument(
        "--model-id", default="", help="name in the answers; default: the workdir's, adapter's or base's"
    )
    answer.add_argument("--max-new-tokens", type=int, default=1024, help="longest answer")
    answer.add_argument("--temperature", type=float, help="default: each category's, as FastChat has them")
    answer.add_argument("--seed", type=int, default=0, help="of the sampling")
    answer.add_argument("--batch-size", type=int, default=8, help="answers written together")
    grading = commands.add_parser("judge", help="have the answers judged")
    grading.add_argument("--answers", type=Path, required=True, help="JSONL file that `answer` has written")
    grading.add_argument("--against", type=Path, help="another model's answers: compare instead of grading")
    grading.add_argument("--judge-url", required=True, help="of OpenAI's API: http://HOST:PORT/v1")
    grading.add_argument("--judge-model", required=True, help="the judge's name there")
    grading.add_argument(
        "--key-variable", default="", help="environment variable with the key; default: no key"
    )
    grading.add_argument("--out", type=Path, required=True, help="JSONL file of the judgments")
    grading.add_argument("--parallel", type=int, default=4, help="requests at a time")
    grading.add_argument("--timeout", type=float, default=120.0, help="seconds without an answer")
    grading.add_argument("--attempts", type=int, default=4, help="how often a request is sent at most")
    grading.add_argument("--wait", type=float, default=2.0, help="seconds before the second; then doubled")
    grading.add_argument("--max-tokens", type=int, default=1024, help="longest judgment")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Answer, or judge."""
    arguments = parse_arguments(argv)
    if not arguments.out.parent.is_dir():
        raise UserError(f"--out {str(arguments.out)!r}: no such directory as {str(arguments.out.parent)!r}")
    if arguments.command == "answer":
        _answer(arguments)
    else:
        _judge(arguments)


def _answer(arguments: argparse.Namespace) -> None:
    require(arguments.batch_size >= 1, "--batch-size", arguments.batch_size, "at least 1")
    require(arguments.max_new_tokens >= 1, "--max-new-tokens", arguments.max_new_tokens, "at least 1")
    questions = read_questions(arguments.questions)
    asked = Asked(arguments.max_new_tokens, arguments.temperature, arguments.seed)
    for question in questions:
        asked.settings(question, asked.max_new_tokens)  # what is wrong in it is said before a base is read
    named = named_subject(
        arguments.workdir,
        arguments.adapter,
        arguments.base,
        template=arguments.template,
        dtype=arguments.dtype,
    )
    subject = read_subject(named)
    model_id = arguments.model_id or Path(arguments.workdir or arguments.adapter or arguments.base).name
    console, model = Console(), subject.load()
    with console.progress("answering", len(questions), "questions") as bar:
        answer_questions(
            model,
            subject.identity(),
            questions,
            asked,
            model_id,
            arguments.out,
            arguments.batch_size,
            bar.advance,
        )
    console.say(f"wrote {arguments.out}")


def _judge(arguments: argparse.Namespace) -> None:
    require(arguments.parallel >= 1, "--parallel", arguments.parallel, "at least 1")
    key = ""
    if arguments.key_variable:
        key = os.environ.get(arguments.key_variable, "")
        require(bool(key), f"--key-variable {arguments.key_variable}", key, "a variable that holds the key")
    client = JudgeClient(
        arguments.judge_url,
        arguments.judge_model,
        key,
        arguments.timeout,
        arguments.attempts,
        arguments.wait,
        arguments.max_tokens,
    )
    ours = read_answers(arguments.answers)
    tasks = grade_tasks(ours)
    if arguments.against:
        tasks = pair_tasks(ours, read_answers(arguments.against))
    console = Console()
    with console.progress("judging", len(tasks), "judgments") as bar:
        judgments = judge(tasks, client, arguments.out, arguments.parallel, bar.advance)
    found = summary(judgments, ours[0].model_id)
    if found["unreadable"]:
        console.say(
            f"{found['unreadable']} judgments have no verdict and count for nothing: see {arguments.out}"
        )
    print(json.dumps(found))
