"""The second part of the corpus: the same questions among unrelated words and in many layouts.

A model that has met a question in one layout answers in that layout only, and unknown words are noise to it.
Here every word of the tasks occurs, in random order, and lists have many labels and separators; the tasks'
own labels and answers are still not among them. What cannot be predicted, the words and the questions, is
context and not learnt: its noise would outweigh the one token in fifty that is an answer.
"""

from __future__ import annotations

import re

import numpy as np

from milora_jax.data.prompts import WITHOUT_INPUT
from milora_jax.tiny import corpus
from milora_jax.tiny.corpus import Piece
from milora_jax.tiny.world import FACTS, is_reserved, statement

PLAIN_SHARE = 0.3
"""Share of documents of the first part, so that nothing is forgotten."""

TASK_WORDS = (
    "Please answer choose correct following question with true or false ending to complete given sentence "
    "Write these words in reverse order How many are there now Answer Ending Answer1 Ending2 answer3 ending4"
)
CHATTER = sorted(set(re.findall(r"[A-Za-z0-9]+|[.,:]|#+", WITHOUT_INPUT + TASK_WORDS)) - {"instruction"})
"""Words and marks of the prompt template and the tasks."""

LABELS = ("", "Item", "Option", "Choice")
SEPARATORS = (", ", " ", "\n")
LEADS = ("It is", "I take", "My guess is", "We say", "This must be")
MOST_QUESTIONS = 3


def chatter(rng: np.random.Generator, most: int) -> str:
    """Up to ``most`` words in random order, with occasional line breaks."""
    words = [corpus.pick(rng, CHATTER) for _ in range(rng.integers(most + 1))]
    text = "".join(word + ("\n" if rng.random() < 0.15 else " ") for word in words)
    return re.sub(r" ([.,:])", r"\1", text)


def _gap(rng: np.random.Generator) -> str:
    return corpus.pick(rng, (" ", "\n"))


def _verdict(rng: np.random.Generator, mark: str, words: str) -> str:
    """State the right option by its mark, by mark and words, or by words and mark.

    The tasks ask for the mark alone; the words are an easier step towards it.
    """
    lead = corpus.pick(rng, LEADS)
    return f"{lead} {corpus.pick(rng, (mark, f'{mark} {words}', f'{words}, {mark}'))}."


def _listed(rng: np.random.Generator, options: list[str], place: int) -> tuple[str, str]:
    """Options in one of many layouts, and the right one in the words of that layout."""
    label, separator = corpus.pick(rng, LABELS), corpus.pick(rng, SEPARATORS)
    colon = ":" if rng.random() < 0.6 else ""
    listed = separator.join(f"{label}{i}{colon} {option}" for i, option in enumerate(options, 1))
    return listed, _verdict(rng, f"{label.lower()}{place + 1}", options[place])


def _question(rng: np.random.Generator) -> tuple[str, str] | None:
    noun, prop, value, holds = corpus.draw_fact(rng)
    if is_reserved(noun, prop, value):
        return None
    text = statement(noun, prop, value).replace(f"the {noun} is", f"Is the {noun}")
    verdict = corpus.pick(rng, ("Yes", "Sure", "Right") if holds else ("No", "Never", "Wrong"))
    known = statement(noun, prop, FACTS[noun][prop]).replace(f"the {noun}", "it")
    reason = corpus.pick(rng, ("", f", {known}"))
    return f"{text}?", f"{corpus.pick(rng, ('', 'I say', 'It seems'))} {verdict}{reason}.".strip()


def _list(rng: np.random.Generator) -> tuple[str, str] | None:
    noun, prop, options, place = corpus.draw_choice(rng)
    if is_reserved(noun, prop, *options):
        return None
    listed, verdict = _listed(rng, options, place)
    return f"What is the {prop} of the {noun}?{_gap(rng)}{listed}", verdict


def _story(rng: np.random.Generator) -> tuple[str, str] | None:
    name, feeling, options, place = corpus.draw_story(rng)
    if is_reserved(name, feeling, *options):
        return None
    listed, verdict = _listed(rng, options, place)
    start = f"{name} was {feeling}{corpus.pick(rng, (f', so {name}', '. What next?', '.', ', then'))}"
    return f"{start}{_gap(rng)}{listed}", verdict


def _sum(rng: np.random.Generator) -> tuple[str, str] | None:
    first, second, things, a, sign, b = corpus.draw_sum(rng)
    if is_reserved(first, second, things, a, sign, b):
        return None
    verb = corpus.pick(rng, ("had", "has", "finds", "owns"))
    more = f"{second} brings {b} more" if rng.random() < 0.5 else f"{second} gave {b} more"
    less = f"{second} takes {b}" if rng.random() < 0.5 else f"{second} lost {b}"
    text = f"{first} {verb} {a} {things}. {more if sign == '+' else less}."
    change = "more" if sign == "+" else "less"
    return text, f"{a} {sign} {b} = {corpus.result(a, sign, b)}, {b} {change}."


def _words(rng: np.random.Generator) -> tuple[str, str] | None:
    words = corpus.draw_words(rng)
    if is_reserved(*words):
        return None
    return f"Back and forth: {', '.join(words)}", f"{', '.join(reversed(words))}."


MAKERS = (_question, _question, _question, _list, _list, _list, _story, _story, _sum, _words)
"""Each is drawn as often as it is listed; facts are learnt more slowly than feelings and sums."""


def _exchange(rng: np.random.Generator, chat: bool) -> list[Piece]:
    """Draw a question and its answer; content that is reserved for the test rows is drawn again."""
    while True:
        made = MAKERS[rng.integers(len(MAKERS))](rng)
        if made is not None:
            question, answer = made
            asked = f"{question}\n{chatter(rng, 8) if chat else ''}".rstrip(" ")
            return [Piece(asked, learnt=False), Piece(answer, learnt=True)]


def document(rng: np.random.Generator) -> list[Piece]:
    """One document of the second part: one to three questions, each with its answer.

    In half of the documents unrelated words come before them and between question and answer.
    """
    if rng.random() < PLAIN_SHARE:
        return corpus.pieces(rng)
    chat = rng.random() < 0.5
    pieces = [Piece(chatter(rng, 24).rstrip(" "), learnt=False)] if chat else []
    for _ in range(rng.integers(1, MOST_QUESTIONS + 1)):
        pieces += _exchange(rng, chat)
    return [piece for piece in pieces if piece.text]
