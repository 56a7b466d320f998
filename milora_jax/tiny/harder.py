"""Harder versions of the five tasks, for comparing methods that are trained to convergence.

The pretrained model has the knowledge that they need, but has never combined it in this way: two facts at
once, things by a fact instead of facts by a thing, two people of whom one matters, two sums in a row, and
four words instead of three.
"""

from __future__ import annotations

import numpy as np

from milora_jax.tiny import TASKS, corpus
from milora_jax.tiny.tasks import LEAD, Maker, listed_options, row_of
from milora_jax.tiny.world import ACTIONS, COUNTED, FACTS, NAMES, VALUES, is_reserved, statement

ROWS = {"train": 1500, "dev": 100, "test": 500}
"""Rows of each split of each task."""


def _predicate(prop: str, value: str) -> str:
    """A property as a predicate: "an animal", "in the forest", "red"."""
    return statement("", prop, value).removeprefix("the  is ")


def _true_false(rng: np.random.Generator) -> tuple[dict[str, str], bool]:
    """A statement about each of two things, true where both hold."""
    nouns = corpus.draw_words(rng, 2)
    props = [corpus.pick(rng, VALUES) for _ in nouns]
    right, partly = rng.random() < 0.5, [(True, False), (False, True), (False, False)]
    holds = (True, True) if right else partly[rng.integers(len(partly))]
    values = [
        FACTS[noun][prop] if known else corpus.pick(rng, [v for v in VALUES[prop] if v != FACTS[noun][prop]])
        for noun, prop, known in zip(nouns, props, holds, strict=True)
    ]
    first, second = (
        f"the {noun} {_predicate(*fact)}" for noun, *fact in zip(nouns, props, values, strict=True)
    )
    text = f"Please answer the following question with true or false, question: Is {first} and {second}?"
    answer = "true" if all(holds) else "false"
    return row_of(text, answer, answer), is_reserved(*nouns, *props, *values)


def _multiple_choice(rng: np.random.Generator) -> tuple[dict[str, str], bool]:
    """Four things, of which one has a property."""
    prop = corpus.pick(rng, VALUES)
    right = corpus.pick(rng, FACTS)
    value = FACTS[right][prop]
    wrong = [noun for noun in FACTS if FACTS[noun][prop] != value]
    options, place = corpus.with_three_wrong(rng, right, wrong)
    text = (
        "Please choose the correct answer to the question: "
        f"Which of these is {_predicate(prop, value)}?\n{listed_options('Answer', options)}"
    )
    answer = f"answer{place + 1}"
    return row_of(text, f"{LEAD}{answer}", answer), is_reserved(prop, value, *options)


def _completion(rng: np.random.Generator) -> tuple[dict[str, str], bool]:
    """Two people, and what one of them does; what the other would do is among the endings."""
    names = [NAMES[i] for i in rng.permutation(len(NAMES))[:2]]
    feelings = [list(ACTIONS)[i] for i in rng.permutation(len(ACTIONS))[:4]]
    asked = int(rng.integers(2))
    order = rng.permutation(4)
    options = [ACTIONS[feelings[i]] for i in order]
    text = (
        "Please choose the correct ending to complete the given sentence: "
        f"{names[0]} was {feelings[0]} and {names[1]} was {feelings[1]}, so {names[asked]}\n"
        f"{listed_options('Ending', options)}"
    )
    answer = f"ending{list(order).index(asked) + 1}"
    return row_of(text, f"{LEAD}{answer}", answer), is_reserved(*names, *feelings, asked, *options)


def _arithmetic(rng: np.random.Generator) -> tuple[dict[str, str], bool]:
    """Two changes of a number, one after the other."""
    names = [NAMES[i] for i in rng.permutation(len(NAMES))[:3]]
    things, total = corpus.pick(rng, COUNTED), int(rng.integers(10, 40))
    text, output, content = f"{names[0]} has {total} {things}.", "", [total]
    for name in names[1:]:
        sign, b = corpus.pick(rng, "+-"), int(rng.integers(2, 10))
        text += f" {name} brings {b} more." if sign == "+" else f" {name} takes {b}."
        after = corpus.result(total, sign, b)
        output += f"{total} {sign} {b} = {after}. "
        total = after
        content += [sign, b]
    text += f" How many {things} are there now?"
    return row_of(text, f"{output}The answer is {total}.", str(total)), is_reserved(*names, things, *content)


def _word_order(rng: np.random.Generator) -> tuple[dict[str, str], bool]:
    """Four words instead of three."""
    words = corpus.draw_words(rng, 4)
    answer = ", ".join(reversed(words))
    text = f"Write these words in reverse order: {', '.join(words)}"
    return row_of(text, answer, answer), is_reserved(*words)


MAKERS: dict[str, Maker] = dict(
    zip(TASKS, (_true_false, _multiple_choice, _completion, _arithmetic, _word_order), strict=True)
)
