"""Extraction of answers from generated text by the rules of the LLM-Adapters project.

Rules for choices take the first match anywhere in the text, case-sensitively; the rule for numbers takes the
last number. Each rule for choices has a strict variant, which matches whole words only; that of the project's
rule for letters, which reads "Because" as B, matches "answer is (X)" only. docs/evaluation.md has a table of
them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

NUMBER_TOLERANCE = 1e-3
"""Largest difference at which two numbers count as equal."""


@dataclass(frozen=True)
class Rule:
    """A way to read and compare answers.

    Attributes:
      extract: returns the answer in generated text, "" where there is none.
      matches: whether an extracted answer equals a gold answer.
      is_gold: whether a whole text is an answer that this rule can read.
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
"""The possible answers of each rule for choices."""

STRICT_PATTERNS = {
    **{name: rf"\b(?:{'|'.join(options)})\b" for name, options in CHOICES.items()},
    "letter": r"answer is \(?([A-E])\b",
}

RULES = {
    **{name: _choice(name, options, "|".join(options)) for name, options in CHOICES.items()},
    "number": Rule("number", _last_number, _same_number, _is_number),
    "text": Rule("text", str.strip, _same_text, lambda gold: bool(gold.strip())),
}
"""The rules of LLM-Adapters by name, and ``text``, which compares the whole answer."""

NARROWEST_FIRST = ("true_false", "solution", "answer", "ending", "option", "number", "letter", "text")
"""The order in which rules are tried on the gold answers."""


def strict(rule: Rule) -> Rule:
    """The strict variant of one of :data:`RULES`; those of numbers and texts are the rules themselves.

    >>> RULES["letter"].extract("Because it is (A)"), strict(RULES["letter"]).extract("the answer is (A)")
    ('B', 'A')
    """
    if rule.name not in STRICT_PATTERNS:
        return rule
    return _choice(f"{rule.name}_strict", CHOICES[rule.name], STRICT_PATTERNS[rule.name])


def narrowest_rule(golds: Sequence[str]) -> Rule:
    """The first rule in :data:`NARROWEST_FIRST` that can read every gold answer.

    >>> narrowest_rule(["true", "false"]).name, narrowest_rule(["12", "3.5"]).name
    ('true_false', 'number')
    """
    fits = (name for name in NARROWEST_FIRST if all(RULES[name].is_gold(gold) for gold in golds))
    return RULES[next(fits, "text")]
