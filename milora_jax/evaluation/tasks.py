"""The tasks of LLM-Adapters: names, rules for their answers, and files of their rows.

The paper's tables use seven of them: ARC-e, ARC-c, BoolQ, OBQA, PIQA, AQuA and GSM8K.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from milora_jax.errors import UserError
from milora_jax.evaluation.extraction import RULES, Rule, narrowest_rule, strict

MOST_BEAMS = 4
"""The number of beams in LLM-Adapters' scripts."""

PAPER_BEAMS = 3

COMMONSENSE_TOKENS, MATH_TOKENS = 32, 256
"""Longest answers in LLM-Adapters' two scripts, in tokens."""


@dataclass(frozen=True)
class Task:
    """One test file of LLM-Adapters.

    Attributes:
      name: name of its folder there.
      title: its name in tables.
      aliases: further names; case, spaces, ``-`` and ``_`` are ignored in all names.
      rule: name of a rule in ``extraction.RULES``.
      rows: number of rows in the test file.
      max_new_tokens: longest answer in tokens.
    """

    name: str
    title: str
    aliases: tuple[str, ...]
    rule: str
    rows: int
    max_new_tokens: int

    @property
    def file(self) -> str:
        """The test file's path in the LLM-Adapters repository."""
        return f"dataset/{self.name}/test.json"


TASKS = (
    Task("boolq", "BoolQ", (), "true_false", 3270, COMMONSENSE_TOKENS),
    Task("piqa", "PIQA", (), "solution", 1838, COMMONSENSE_TOKENS),
    Task("social_i_qa", "SIQA", ("social_iqa",), "answer", 1954, COMMONSENSE_TOKENS),
    Task("hellaswag", "HellaSwag", (), "ending", 10042, COMMONSENSE_TOKENS),
    Task("winogrande", "WinoGrande", (), "option", 1267, COMMONSENSE_TOKENS),
    Task("ARC-Easy", "ARC-e", (), "answer", 2376, COMMONSENSE_TOKENS),
    Task("ARC-Challenge", "ARC-c", (), "answer", 1172, COMMONSENSE_TOKENS),
    Task("openbookqa", "OBQA", (), "answer", 500, COMMONSENSE_TOKENS),
    Task("AQuA", "AQuA", ("aqua_rat",), "letter", 254, MATH_TOKENS),
    Task("gsm8k", "GSM8K", (), "number", 1319, MATH_TOKENS),
    Task("SVAMP", "SVAMP", (), "number", 1000, MATH_TOKENS),
    Task("mawps", "MAWPS", (), "number", 238, MATH_TOKENS),
    Task("AddSub", "AddSub", (), "number", 395, MATH_TOKENS),
    Task("MultiArith", "MultiArith", (), "number", 600, MATH_TOKENS),
    Task("SingleEq", "SingleEq", (), "number", 508, MATH_TOKENS),
)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter not in " -_")


_BY_NAME = {_plain(name): task for task in TASKS for name in (task.name, task.title, *task.aliases)}


def find_task(name: str) -> Task | None:
    """The task with a name, or None.

    >>> find_task("arc-e").name, find_task("Social IQa").title, find_task("mine")
    ('ARC-Easy', 'SIQA', None)
    """
    return _BY_NAME.get(_plain(name))


def task_named(name: str) -> Task:
    """The task with a name.

    Raises:
      UserError: there is none; the error has the nearest name.
    """
    task = find_task(name)
    if task is None:
        near = difflib.get_close_matches(_plain(name), _BY_NAME, n=1)
        hint = f" (did you mean {_BY_NAME[near[0]].name!r}?)" if near else ""
        known = ", ".join(each.name for each in TASKS)
        raise UserError(f"no task is called {name!r}: expected one of {known}{hint}")
    return task


def rule_for(name: str, golds: Sequence[str], only_strict: bool = False) -> Rule:
    """The rule of a known task, else the first one that can read every gold answer.

    Args:
      only_strict: use its strict variant.

    >>> rule_for("gsm8k", []).name, rule_for("mine", ["true"]).name, rule_for("AQuA", [], True).name
    ('number', 'true_false', 'letter_strict')
    """
    task = find_task(name)
    rule = narrowest_rule(golds) if task is None else RULES[task.rule]
    return strict(rule) if only_strict else rule


def require_golds(name: str, golds: Sequence[str], rule: Rule) -> str:
    """Refuse rows whose gold answers do not belong to the task whose name they have.

    Returns:
      "", or a line about something unusual: no gold answers, or some that can never be matched, or another
      number of rows than the published one.

    Raises:
      UserError: the rule can read no gold answer at all.
    """
    if golds and not any(golds):
        return f"{name}: its {len(golds)} rows have no answers, so there are predictions and no accuracy"
    task = find_task(name)
    if task is None:
        return ""
    wrong = [gold for gold in golds if not rule.is_gold(gold)]
    if len(wrong) == len(golds):
        raise UserError(
            f"none of the {len(golds)} answers is one of task {task.name!r} (the first is {wrong[0]!r}): "
            f"expected rows like those of {task.file}; rows of your own need another name, NAME=FILE"
        )
    if wrong:
        return f"{name}: {len(wrong)} of {len(golds)} gold answers cannot be read (the first is {wrong[0]!r})"
    if len(golds) != task.rows:
        return f"{name}: {len(golds)} rows, LLM-Adapters' test file has {task.rows}"
    return ""
