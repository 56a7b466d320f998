"""Another model as the judge of answers to MT-Bench, on any server of OpenAI's API.

``single`` grades each answer from 1 to 10; ``pairs`` lets the judge choose between two models' answers, in
both orders, because judges prefer a position (Zheng et al. 2023, section 3.3). The methods are the paper's,
in our own words: figures by other prompts are not exactly comparable.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milora_jax.errors import UserError
from milora_jax.evaluation.judge_client import JudgeClient
from milora_jax.evaluation.mt_bench import Answered, Question, read_rows, write_rows

GRADE = (
    "You grade the answers of an AI assistant. Judge how helpful, relevant, correct, thorough and clear the "
    "answer is, and whether it does what the user asked. Length by itself is no merit. Explain your view in "
    "a few sentences first. Then end with your grade from 1 (useless) to 10 (could not be better) in double "
    "square brackets, for example: [[5]]"
)

COMPARE = (
    "You compare the answers of two AI assistants to the same user. Judge how helpful, relevant, correct, "
    "thorough and clear they are, and whether they do what the user asked. The order in which they are "
    "shown, their lengths and the assistants' names must not matter. Explain your view in a few sentences "
    "first. Then end with your verdict: [[A]] if assistant A is better, [[B]] if assistant B is better, "
    "[[C]] if neither is."
)

LAST_TURN = " The conversation has several turns: judge the answer to the user's last message."

GRADED = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
CHOSEN = re.compile(r"\[\[\s*([ABC])\s*\]\]")

LOWEST, HIGHEST = 1, 10


@dataclass(frozen=True)
class Task:
    """One question to the judge.

    Attributes:
      about: identifies the question in the output: question, turn, mode, models.
      messages: messages to send.
    """

    about: dict[str, Any]
    messages: tuple[dict[str, str], ...]

    def key(self, judge: str) -> str:
        """A key that is equal for the same messages about the same subject to the same judge."""
        return hashlib.sha256(json.dumps([judge, self.about, self.messages]).encode()).hexdigest()


def grade_tasks(answered: Sequence[Answered]) -> list[Task]:
    """Make a task of grading for every turn of every question."""
    tasks = []
    for each in answered:
        for turn in range(len(each.answers)):
            system = GRADE + (LAST_TURN if turn else "")
            text = _reference(each.question, turn) + _conversation(each, turn, "assistant")
            about = {"question_id": each.question.question_id, "turn": turn + 1, "mode": "single"}
            tasks.append(Task({**about, "model_id": each.model_id}, _messages(system, text)))
    return tasks


def pair_tasks(ours: Sequence[Answered], theirs: Sequence[Answered]) -> list[Task]:
    """Make tasks of choosing for every turn of every question, in both orders.

    Raises:
      UserError: the two files answer different questions.
    """
    others = {each.question.question_id: each for each in theirs}
    missing = [e.question.question_id for e in ours if e.question.question_id not in others]
    if missing or len(ours) != len(others):
        first = f", {missing[0]} for example" if missing else ""
        raise UserError(f"--against holds answers to other questions than --answers{first}")
    tasks = []
    for mine in ours:
        other = others[mine.question.question_id]
        if other.question.turns != mine.question.turns:
            raise UserError(f"--against words question {mine.question.question_id} otherwise than --answers")
        for turn in range(len(mine.answers)):
            for order, pair in (("given", (mine, other)), ("reversed", (other, mine))):
                system = COMPARE + (LAST_TURN if turn else "")
                shown = [
                    f"[The conversation with {name}]\n{_conversation(each, turn, name)}"
                    for name, each in zip(("assistant A", "assistant B"), pair, strict=True)
                ]
                text = _reference(mine.question, turn) + "\n\n".join(shown)
                about = {"question_id": mine.question.question_id, "turn": turn + 1, "mode": "pair"}
                models = [each.model_id for each in pair]
                tasks.append(Task({**about, "order": order, "models": models}, _messages(system, text)))
    return tasks


def _messages(system: str, text: str) -> tuple[dict[str, str], ...]:
    return {"role": "system", "content": system}, {"role": "user", "content": text}


def _reference(question: Question, turn: int) -> str:
    """Good answers to the turns up to this one, where the question has them."""
    if turn >= len(question.reference):
        return ""
    shown = "\n\n".join(question.reference[: turn + 1])
    return f"[A good answer, to compare with]\n{shown}\n\n"


def _conversation(answered: Answered, turn: int, name: str) -> str:
    said = zip(answered.question.turns[: turn + 1], answered.answers[: turn + 1], strict=True)
    return "\n\n".join(f"[user]\n{asked}\n\n[{name}]\n{answer}" for asked, answer in said)


def verdict(mode: str, text: str) -> float | str | None:
    """Parse a judge's final verdict: a grade, or A, B or C; None where there is none.

    >>> verdict("single", "Fine, but short: [[7]]"), verdict("pair", "[[A]] ... no, [[B]]")
    (7.0, 'B')
    >>> verdict("single", "I would give it 7.")
    """
    found = (GRADED if mode == "single" else CHOSEN).findall(text)
    if not found:
        return None
    if mode == "pair":
        return found[-1]
    return grade if LOWEST <= (grade := float(found[-1])) <= HIGHEST else None


def judge(
    tasks: Sequence[Task],
    client: JudgeClient,
    out: Path,
    parallel: int,
    progress: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Request the judgments that ``out`` lacks; the file is rewritten after every judgment.

    Args:
      parallel: number of concurrent requests.
      progress: called with the number of new judgments.

    Returns:
      All judgments, in the order of the tasks.

    Raises:
      UserError: ``out`` holds judgments of other answers or of another judge; or the judge does not answer.
        The judgments that were finished are written before.
    """
    keys = [task.key(client.model) for task in tasks]
    found = {row.get("key"): row for row, _ in (read_rows(out) if out.exists() else [])}
    if not found.keys() <= set(keys):
        raise UserError(f"{out}: holds judgments of other answers or of another judge, give another --out")
    progress(sum(key in found for key in keys))
    left = {key: task for key, task in zip(keys, tasks, strict=True) if key not in found}
    problem = None
    with ThreadPoolExecutor(parallel) as pool:
        asked = {pool.submit(client.ask, task.messages): key for key, task in left.items()}
        try:
            for done in as_completed(asked):
                if done.cancelled():
                    continue
                if (error := done.exception()) is not None:
                    problem = problem or error
                    _give_up(client, asked)
                    continue
                key, text = asked[done], done.result()
                task = left[key]
                said = {"judge": client.model, "verdict": verdict(task.about["mode"], text)}
                found[key] = {**task.about, **said, "judgment": text, "key": key}
                write_rows(out, [found[each] for each in keys if each in found])
                progress(1)
        finally:
            _give_up(client, asked)
    if problem is not None:
        raise problem
    return [found[key] for key in keys]


def _give_up(client: JudgeClient, asked: Iterable[Future[str]]) -> None:
    """Start no further request, and end the waiting before retries."""
    client.give_up()
    for future in asked:
        future.cancel()


def summary(judgments: Sequence[dict[str, Any]], model_id: str) -> dict[str, Any]:
    """Means of the grades, or how often a model's answers were chosen.

    A pair is won if it was won in both orders; where the two orders disagree it is a tie.
    """
    unreadable = sum(row["verdict"] is None for row in judgments)
    turns = sorted({row["turn"] for row in judgments})
    if judgments[0]["mode"] == "single":
        grades = {turn: [r["verdict"] for r in judgments if r["turn"] == turn] for turn in turns}
        by_turn = {turn: _mean(each) for turn, each in grades.items()}
        whole = _mean([grade for each in grades.values() for grade in each])
        return {"mode": "single", "score": whole, "by_turn": by_turn, "unreadable": unreadable}
    counts = {"won": 0, "lost": 0, "tied": 0}
    places: dict[tuple, list[int]] = {}
    for row in judgments:
        points = {None: 0, "C": 0, "A": 1, "B": -1}[row["verdict"]]
        sign = 1 if row["order"] == "given" else -1
        places.setdefault((row["question_id"], row["turn"]), []).append(sign * points)
    for each in places.values():
        counts["won" if min(each) > 0 else "lost" if max(each) < 0 else "tied"] += 1
    rate = (counts["won"] + 0.5 * counts["tied"]) / len(places)
    return {"mode": "pair", "model_id": model_id, **counts, "win_rate": rate, "unreadable": unreadable}


def _mean(grades: Sequence[float | None]) -> float | None:
    known = [grade for grade in grades if grade is not None]
    return sum(known) / len(known) if known else None
