"""MT-Bench (Zheng et al. 2023, arXiv 2306.05685): questions of two turns, answered by a tuned model.

Files have FastChat's format: questions have ``question_id``, ``category``, ``turns`` and perhaps
``reference``; answers have ``question_id``, ``model_id`` and ``choices``, and also the question, so that a
judge needs no other file. The questions themselves are not part of this package.

Each turn is a prompt of its own: the second includes the first with its answer, and has its own route.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from milora_jax.data.chat import UNWRITABLE, Message
from milora_jax.data.prompts import prompt_text
from milora_jax.data.records import Record
from milora_jax.data.rows import parse_row
from milora_jax.data.scopes import EncodedPrompt, encode_messages, whole_prompt
from milora_jax.data.tokens import encode_prompt
from milora_jax.errors import UserError
from milora_jax.evaluation.subject import Model
from milora_jax.generation.settings import GenerationSettings
from milora_jax.generation.text import Answer, generate
from milora_jax.storage.files import write_atomic

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""Temperatures of categories in FastChat; those of the others are 0, which is greedy."""

NEXT_TURN = "\n\n### Instruction:\n{question}\n\n### Response:\n"
"""The form of a further turn after an answer in the ``alpaca`` template."""


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
      turns: the user's messages, turn by turn.
      reference: good answers to the first turns, or all, for the judge.
    """

    question_id: int | str
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answered:
    """A question with a model's answer to each turn."""

    question: Question
    model_id: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Asked:
    """The settings of the answers.

    Attributes:
      temperature: temperature of all categories; None takes those of :data:`TEMPERATURES`.
      seed: seed of sampled answers.
    """

    max_new_tokens: int = 1024
    temperature: float | None = None
    seed: int = 0

    def settings(self, question: Question, room: int) -> GenerationSettings:
        """The settings of the answer to one turn of a question.

        Args:
          room: number of tokens that the context leaves.
        """
        own = TEMPERATURES.get(question.category, 0.0)
        return GenerationSettings(
            max_new_tokens=min(self.max_new_tokens, max(1, room)),
            temperature=own if self.temperature is None else self.temperature,
            seed=self.seed,
        )


def answer_questions(
    model: Model,
    identity: Mapping[str, Any],
    questions: Sequence[Question],
    asked: Asked,
    model_id: str,
    out: Path,
    batch_size: int,
    progress: Callable[[int], None],
) -> None:
    """Answer the questions that ``out`` has no answers to; the file is rewritten after every few questions.

    Its answers to other questions stay there.

    Args:
      identity: identity of the model, see ``Subject.identity``.
      progress: called with the number of newly answered questions.

    Raises:
      UserError: ``out`` holds answers by other settings; or questions have no room for an answer, after all
        others are answered.
    """
    made_by = {"model_id": model_id, "settings": {**asdict(asked), **identity}}
    rows = _earlier(out, made_by, questions)
    progress(sum(question.question_id in rows for question in questions))
    left = [question for question in questions if question.question_id not in rows]
    problems = []
    for start in range(0, len(left), 2 * batch_size):
        group = left[start : start + 2 * batch_size]
        for question, answers in zip(group, _answers(model, group, asked, batch_size), strict=True):
            if isinstance(answers, str):
                problems.append(f"question {question.question_id}: {answers}")
                continue
            said = {"question_id": question.question_id, "category": question.category}
            choices = [{"index": 0, "turns": answers}]
            rows[question.question_id] = {
                **said,
                **made_by,
                "questions": question.turns,
                "reference": question.reference,
                "choices": choices,
            }
        in_order = dict.fromkeys([*(question.question_id for question in questions), *rows])
        write_rows(out, [rows[number] for number in in_order if number in rows])
        progress(len(group))
    if problems:
        raise UserError(
            f"{len(problems)} of {len(questions)} questions have no answer ({problems[0]}); "
            f"the others are in {out}"
        )


def _answers(model: Model, group: Sequence[Question], asked: Asked, batch_size: int) -> list[list[str] | str]:
    """The answers to each question, or the reason why there is none."""
    done: list[list[str] | str] = [[] for _ in group]
    for turn in range(max(len(question.turns) for question in group)):
        places = [i for i, said in enumerate(done) if isinstance(said, list) and turn < len(group[i].turns)]
        prompts = [turn_prompt(model, group[i].turns[: turn + 1], done[i]) for i in places]
        rooms = [model.config.max_positions - len(prompt) for prompt in prompts]
        found: list[Answer] = generate(
            model.base,
            model.config,
            model.tokenizer,
            prompts,
            adapter=model.adapter,
            settings=[asked.settings(group[i], room) for i, room in zip(places, rooms, strict=True)],
            batch_size=batch_size,
            return_errors=True,
        )
        for i, answer in zip(places, found, strict=True):
            said = done[i]
            if answer.error:
                done[i] = f"turn {turn + 1}: {answer.error}"
            elif isinstance(said, list):
                said.append(answer.text.strip())
    return done


def turn_prompt(model: Model, turns: Sequence[str], answers: Sequence[str]) -> EncodedPrompt:
    """The prompt of the last of ``turns``: all that was said before, in the model's template.

    Args:
      answers: answers to the turns before.
    """
    written = model.prompt_format
    if written.template == "chat":
        messages = [Message("user", turns[0])]
        for answer, question in zip(answers, turns[1:], strict=True):
            messages += [Message("assistant", answer), Message("user", question)]
        return encode_messages(model.tokenizer, messages, written)
    text = prompt_text(Record(turns[0], "", "", ""))
    for answer, question in zip(answers, turns[1:], strict=True):
        text += answer + NEXT_TURN.format(question=question)
    return whole_prompt(encode_prompt(model.tokenizer, text, written.special_tokens), written)


def _earlier(
    out: Path, made_by: Mapping[str, Any], questions: Sequence[Question]
) -> dict[int | str, dict[str, Any]]:
    """The answers that exist already and have the same settings, by question."""
    rows: dict[int | str, dict[str, Any]] = {}
    turns = {question.question_id: list(question.turns) for question in questions}
    for row, where in read_rows(out) if out.exists() else []:
        number = row.get("question_id")
        if number is None or any(row.get(name) != value for name, value in made_by.items()):
            raise UserError(f"{where}: an answer of another model or with other settings, give another --out")
        if row.get("questions") != turns.get(number, row.get("questions")):
            raise UserError(f"{where}: question {number} has other words than now, give another --out")
        rows[number] = row
    return rows


def read_questions(path: Path) -> list[Question]:
    """Read the questions of a file.

    Raises:
      UserError: a line holds no question; the error names it.
    """
    questions = [_question(row, row.get("turns"), where) for row, where in read_rows(path)]
    if not questions:
        raise UserError(f"{path}: holds no question")
    if len({question.question_id for question in questions}) < len(questions):
        raise UserError(f"{path}: a question_id is there twice")
    return questions


def read_answers(path: Path) -> list[Answered]:
    """Read the answers of a file that :func:`answer_questions` wrote.

    Raises:
      UserError: a line holds no answers; the error names it.
    """
    found = []
    for row, where in read_rows(path):
        question = _question(row, row.get("questions"), where)
        choices, model = row.get("choices"), row.get("model_id")
        first = choices[0] if isinstance(choices, list) and choices else None
        turns = first.get("turns", []) if isinstance(first, dict) else []
        if not _texts(turns) or len(turns) != len(question.turns) or not isinstance(model, str):
            raise UserError(
                f"{where}: expected model_id, and choices whose first has an answer for each turn"
            )
        found.append(Answered(question, model, tuple(turns)))
    if not found:
        raise UserError(f"{path}: holds no answer")
    return found


def _question(row: Mapping[str, Any], turns: Any, where: str) -> Question:
    number, reference = row.get("question_id"), row.get("reference") or []
    if not isinstance(number, (int, str)) or not _texts(turns) or not turns or not _texts(reference):
        raise UserError(
            f"{where}: expected question_id, category and the turns of a question, a list of texts"
        )
    if any(UNWRITABLE.search(text) for text in (*turns, *reference)):
        raise UserError(f"{where}: a text with a null or half a surrogate pair, which no tokenizer reads")
    return Question(number, str(row.get("category", "")), tuple(turns), tuple(reference))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def read_rows(path: Path) -> list[tuple[dict[str, Any], str]]:
    """Read the objects of a JSONL file, each with its location.

    Raises:
      UserError: the file is missing, or a line holds no object.
    """
    try:
        # Not splitlines(), which also splits at U+2028 and other characters that JSON may hold.
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(
            f"{path}: {(error.strerror or 'not readable').lower()}, expected JSON lines"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: expected UTF-8 text") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}:{number}"
            row = parse_row(line, where)
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected a JSON object")
            rows.append((row, where))
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write objects as JSON lines, all or nothing."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # A lone surrogate, which UTF-8 cannot encode, is written as JSON's escape.
    write_atomic(path, text.encode("utf-8", "backslashreplace"))
