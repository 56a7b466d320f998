"""The pretraining corpus: facts, questions, sums, lists and stories in plain English.

It holds the knowledge and the skills that the tasks need, but none of their wordings: no instruction, no
"true" or "false", no "answer2". A model trained on it knows the answers but cannot give them in the form of a
task; fine-tuning teaches the form.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from milora_jax.tiny.world import ACTIONS, COUNTED, FACTS, NAMES, VALUES, is_reserved, statement


class Piece(NamedTuple):
    """A part of a document, and whether its tokens are learnt or only context."""

    text: str
    learnt: bool


def pick(rng: np.random.Generator, options: Iterable[str]) -> str:
    """Pick one of the options at random."""
    listed = list(options)
    return listed[rng.integers(len(listed))]


def with_three_wrong(rng: np.random.Generator, right: str, wrong: list[str]) -> tuple[list[str], int]:
    """Put the right option among three wrong ones; return them and its place (0 to 3)."""
    options = [wrong[i] for i in rng.permutation(len(wrong))[:3]]
    place = int(rng.integers(4))
    return [*options[:place], right, *options[place:]], place


def draw_fact(rng: np.random.Generator) -> tuple[str, str, str, bool]:
    """Draw a noun, a property, a value that is true in half of the cases, and whether it is."""
    noun, prop = pick(rng, FACTS), pick(rng, VALUES)
    right = FACTS[noun][prop]
    if rng.random() < 0.5:
        return noun, prop, right, True
    return noun, prop, pick(rng, [v for v in VALUES[prop] if v != right]), False


def draw_choice(rng: np.random.Generator) -> tuple[str, str, list[str], int]:
    """Draw a noun, a property, four of its values and the place (0 to 3) of the right one."""
    noun, prop = pick(rng, FACTS), pick(rng, VALUES)
    right = FACTS[noun][prop]
    return noun, prop, *with_three_wrong(rng, right, [v for v in VALUES[prop] if v != right])


def draw_story(rng: np.random.Generator) -> tuple[str, str, list[str], int]:
    """Draw a name, a feeling, four actions and the place (0 to 3) of the one that fits."""
    name, feeling = pick(rng, NAMES), pick(rng, ACTIONS)
    wrong = [action for other, action in ACTIONS.items() if other != feeling]
    return name, feeling, *with_three_wrong(rng, ACTIONS[feeling], wrong)


def draw_sum(rng: np.random.Generator) -> tuple[str, str, str, int, str, int]:
    """Draw two names, the things counted, a number, "+" or "-", and a second number below the first."""
    first, second = (NAMES[i] for i in rng.permutation(len(NAMES))[:2])
    return (
        first,
        second,
        pick(rng, COUNTED),
        int(rng.integers(10, 40)),
        pick(rng, "+-"),
        int(rng.integers(2, 10)),
    )


def draw_words(rng: np.random.Generator, count: int = 3) -> list[str]:
    """Draw different nouns."""
    nouns = list(FACTS)
    return [nouns[i] for i in rng.permutation(len(nouns))[:count]]


def result(a: int, sign: str, b: int) -> int:
    """The value of ``a sign b``."""
    return a + b if sign == "+" else a - b


def _fact(rng: np.random.Generator) -> str:
    noun = pick(rng, FACTS)
    props = [list(VALUES)[i] for i in rng.permutation(3)]
    text = ". ".join(
        s[0].upper() + s[1:] for s in (statement(noun, prop, FACTS[noun][prop]) for prop in props)
    )
    return f"{text}."


def _question(rng: np.random.Generator) -> str | None:
    noun, prop, value, holds = draw_fact(rng)
    if is_reserved(noun, prop, value):
        return None
    text = statement(noun, prop, value).replace(f"the {noun} is", f"Is the {noun}")
    known = statement(noun, prop, FACTS[noun][prop]).replace(f"the {noun}", "it")
    return f"{text}? {'Yes' if holds else 'No'}, {known}."


def _verdict(rng: np.random.Generator, start: str, place: int, options: list[str]) -> str:
    """State the right option by number and by words, in either order.

    Words first is easier, because it repeats what was just said; number first needs both at once.
    """
    number, words = place + 1, options[place]
    return f"{start} {number} {words}." if rng.random() < 0.6 else f"{start} {words}, number {number}."


def _list(rng: np.random.Generator) -> str | None:
    noun, prop, options, place = draw_choice(rng)
    if is_reserved(noun, prop, *options):
        return None
    listed = ", ".join(f"{i} {option}" for i, option in enumerate(options, 1))
    question = f"What is the {prop} of the {noun}? {listed}."
    return f"{question} {_verdict(rng, 'It is', place, options)}"


def _story(rng: np.random.Generator) -> str | None:
    name, feeling, options, place = draw_story(rng)
    if rng.random() < 0.3:
        return f"{name} was {feeling}. So {name} {ACTIONS[feeling]}. {_fact(rng)}"
    if is_reserved(name, feeling, *options):
        return None
    listed = ", ".join(f"{i} {option}" for i, option in enumerate(options, 1))
    return f"{name} was {feeling}. What next? {listed}. {_verdict(rng, 'It was', place, options)}"


def _sum(rng: np.random.Generator) -> str | None:
    first, second, things, a, sign, b = draw_sum(rng)
    if rng.random() < 0.5:
        return f"{a} {sign} {b} = {result(a, sign, b)}."
    if is_reserved(first, second, things, a, sign, b):
        return None
    change = f"{second} brought {b} more" if sign == "+" else f"{second} took {b}"
    sum_text = f"{a} {sign} {b} = {result(a, sign, b)}"
    return f"{first} had {a} {things}. {change}. {sum_text}. Now there are {result(a, sign, b)}."


def _words(rng: np.random.Generator) -> str | None:
    words = draw_words(rng)
    if is_reserved(*words):
        return None
    return f"We saw {', '.join(words)}. On the way back we saw {', '.join(reversed(words))}."


KINDS = ((_fact, 0.14), (_question, 0.18), (_list, 0.28), (_story, 0.22), (_sum, 0.1), (_words, 0.08))
"""Kinds of documents and their shares."""


def document(rng: np.random.Generator) -> str:
    """Draw one document; content that is reserved for the test rows is drawn again."""
    makers, shares = zip(*KINDS, strict=True)
    while True:
        text = makers[rng.choice(len(makers), p=shares)](rng)
        if text is not None:
            return text


def pieces(rng: np.random.Generator) -> list[Piece]:
    """Draw one document that is learnt from end to end."""
    return [Piece(document(rng), learnt=True)]
