"""How an answer is read out of generated text: the rules of the LLM-Adapters project.

Choices take the first match anywhere in the text, case-sensitively; numbers the last number. A strict rule
stands beside each choice: whole words only; and beside the project's rule for letters, which reads "Because"
as B, one that reads "answer is (X)" only. docs/evaluation.md has them in a table.
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
      is_gold: whether a text is, as a whole, an answer that this rule can read.
    """

    name: str
    extract: Callable[[str], str]
    matches: Callable[[str, str], bool]
    is_gold: Callable[[str], bool]


def _first(pattern: str) -> Callable[[str], str]:
    compiled = re.compile(pattern)

    def extract(text: str) -> str:
        found = compiled.search(text)
        return found.group(found.lastindex or 0) if found else ""

    return extract


_NUMBER = re.compile(r"-?\d+\.?\d*")


def _last_number(text: str) -> str:
    found = _NUMBER.findall(text.replace(",", ""))
    return found[-1] if found else ""


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text.strip().replace(",", "")) is not None


def _same_text(prediction: str, gold: str) -> bool:
    return prediction == gold.strip()


def _same_number(prediction: str, gold: str) -> bool:
    expected = _last_number(gold)
    if not prediction or not expected:
        return False
    return abs(float(prediction) - float(expected)) <= NUMBER_TOLERANCE


def _choice(name: str, options: Sequence[str], pattern: str) -> Rule:
    return Rule(name, _first(pattern), _same_text, lambda gold: gold.strip() in options)


CHOICES = {
    "true_false": ("true", "false"),
    "solution": ("solution1", "solution2"),
    "answer": tuple(f"answer{i}" for i in range(1, 6)),
    "ending": tuple(f"ending{i}" for i in range(1, 5)),
    "option": ("option1", "option2"),
    "letter": tuple("ABCDE"),
}
"""The answers among which each rule for choices looks."""

STRICT_PATTERNS = {
    **{name: rf"\b(?:{'|'.join(options)})\b" for name, options in CHOICES.items()},
    "letter": r"answer is \(?([A-E])\b",
}

RULES = {
    **{name: _choice(name, options, "|".join(options)) for name, options in CHOICES.items()},
    "number": Rule("number", _last_number, _same_number, _is_number),
    "text": Rule("text", str.strip, _same_text, lambda gold: bool(gold.strip())),
}
"""The rules of LLM-Adapters by name, and ``text``, which compares all of an answer."""

NARROWEST_FIRST = ("true_false", "solution", "answer", "ending", "option", "number", "letter", "text")
"""The order in which a rule is looked for by the gold answers."""


def strict(rule: Rule) -> Rule:
    """The strict rule beside one of :data:`RULES`; numbers and texts have none, and are their own.

    >>> RULES["letter"].extract("Because it is (A)"), strict(RULES["letter"]).extract("the answer is (A)")
    ('B', 'A')
    """
    if rule.name not in STRICT_PATTERNS:
        return rule
    return _choice(f"{rule.name}_strict", CHOICES[rule.name], STRICT_PATTERNS[rule.name])


def narrowest_rule(golds: Sequence[str]) -> Rule:
    """The narrowest rule by which every gold answer is an answer.

    >>> narrowest_rule(["true", "false"]).name, narrowest_rule(["12", "3.5"]).name
    ('true_false', 'number')
    """
    fits = (name for name in NARROWEST_FIRST if all(RULES[name].is_gold(gold) for gold in golds))
    return RULES[next(fits, "text")]
