"""How an answer is read out of generated text: the rules of the LLM-Adapters project.

Choices take the first match anywhere in the text, case-sensitively; numbers the last number. ``letter``
is the project's rule for AQuA, which reads "Because" as B; ``letter_strict`` reads "answer is (X)" only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

NUMBER_TOLERANCE = 1e-3
"""Largest difference at which two numbers count as equal."""


@dataclass(frozen=True)
class Rule:
    """One way to read and compare answers.

    Attributes:
      extract: generated text to the answer in it, "" where there is none.
      matches: whether an extracted answer equals a gold answer.
    """

    name: str
    extract: Callable[[str], str]
    matches: Callable[[str, str], bool]


def _first(pattern: str) -> Callable[[str], str]:
    compiled = re.compile(pattern)

    def extract(text: str) -> str:
        found = compiled.search(text)
        return found.group(found.lastindex or 0) if found else ""

    return extract


def _last_number(text: str) -> str:
    found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return found[-1] if found else ""


def _same_text(prediction: str, gold: str) -> bool:
    return prediction == gold.strip()


def _same_number(prediction: str, gold: str) -> bool:
    expected = _last_number(gold)
    if not prediction or not expected:
        return False
    return abs(float(prediction) - float(expected)) <= NUMBER_TOLERANCE


def _choice(name: str, options: Sequence[str]) -> Rule:
    return Rule(name, _first("|".join(options)), _same_text)


RULES = {
    rule.name: rule
    for rule in (
        _choice("true_false", ("true", "false")),
        _choice("solution", ("solution1", "solution2")),
        _choice("answer", tuple(f"answer{i}" for i in range(1, 6))),
        _choice("ending", tuple(f"ending{i}" for i in range(1, 5))),
        _choice("option", ("option1", "option2")),
        Rule("number", _last_number, _same_number),
        _choice("letter", tuple("ABCDE")),
        Rule("letter_strict", _first(r"answer is \(?([A-E])\b"), _same_text),
        Rule("text", str.strip, _same_text),
    )
}
"""Every rule by name, narrowest first."""

TASK_RULES = {
    "boolq": "true_false",
    "piqa": "solution",
    "social_i_qa": "answer",
    "arc-easy": "answer",
    "arc-challenge": "answer",
    "openbookqa": "answer",
    "hellaswag": "ending",
    "winogrande": "option",
    "gsm8k": "number",
    "svamp": "number",
    "mawps": "number",
    "addsub": "number",
    "multiarith": "number",
    "singleeq": "number",
    "aqua": "letter",
    "aqua-strict": "letter_strict",
}
"""Rules of the LLM-Adapters tasks, by lower-case name."""


def rule_for(task: str, golds: Sequence[str]) -> Rule:
    """The rule of a known task, else the narrowest one that reads every gold answer as itself.

    >>> rule_for("mine", ["true", "false"]).name, rule_for("mine", ["12", "3.5"]).name
    ('true_false', 'number')
    """
    known = TASK_RULES.get(task.lower())
    if known is not None:
        return RULES[known]
    fits = (
        rule
        for rule in RULES.values()
        if rule.name != "letter_strict" and all(rule.extract(gold) == gold.strip() for gold in golds)
    )
    return next(fits)
