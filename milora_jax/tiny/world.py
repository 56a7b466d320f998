"""A small made-up world: the facts that the pretraining corpus states and the tasks ask about.

Everything is a pure function of the word lists, without files, clocks or seeds.
"""

from __future__ import annotations

import hashlib

import numpy as np

THINGS = {
    "animal": "fox bear owl frog goat horse rabbit mouse duck snail tiger whale crab wolf hen".split(),
    "fruit": "apple pear plum grape lemon peach cherry melon mango fig banana orange kiwi berry date".split(),
    "tool": "hammer saw drill rake shovel brush knife ladder rope nail pump wrench file axe broom".split(),
    "toy": "ball doll kite puzzle robot drum block whistle top yoyo puppet dice card marble train".split(),
    "vehicle": "car bus boat truck bike plane tram ship van sled canoe jeep taxi wagon ferry".split(),
    "garment": "hat coat shirt scarf glove sock boot belt dress skirt vest cap shoe jacket tie".split(),
}
"""Nouns by kind."""

PLACES = ("garden", "kitchen", "forest", "school", "market", "harbor", "tower", "cellar")
COLORS = ("red", "blue", "green", "white", "black", "brown", "pink", "yellow")
NAMES = "Ann Tom Eva Max Lea Ben Ida Sam Mia Leo Zoe Dan Amy Jon Eli Una".split()

COUNTED = (
    "apples pears plums lemons melons bananas kiwis balls dolls kites drums blocks cards coats hats socks"
).split()
"""Things that are counted in sums."""

ACTIONS = {
    "thirsty": "drank some water",
    "hungry": "ate some bread",
    "tired": "went to bed",
    "cold": "lit the fire",
    "hot": "opened the window",
    "dirty": "took a bath",
    "sick": "saw the doctor",
    "bored": "read a book",
    "lost": "asked for the way",
    "late": "ran to the bus",
    "lonely": "called a friend",
    "happy": "sang a song",
    "wet": "found a towel",
    "scared": "turned on the light",
    "curious": "looked into the box",
    "angry": "shut the door",
}
"""Actions of people in the stories, by their feelings."""


def article(noun: str) -> str:
    """Put the indefinite article before a noun."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _facts() -> dict[str, dict[str, str]]:
    rng = np.random.default_rng(20241018)
    facts = {}
    for kind, nouns in THINGS.items():
        for noun in nouns:
            place = PLACES[rng.integers(len(PLACES))]
            color = COLORS[rng.integers(len(COLORS))]
            facts[noun] = {"kind": kind, "place": place, "color": color}
    return facts


FACTS = _facts()
"""Kind, place and color of every noun."""

VALUES = {"kind": tuple(THINGS), "place": PLACES, "color": COLORS}
"""The values of each property."""


def statement(noun: str, prop: str, value: str) -> str:
    """A property in words, without a full stop: "the fox lives in the forest".

    >>> statement("fox", "kind", "animal")
    'the fox is an animal'
    """
    if prop == "kind":
        return f"the {noun} is {article(value)}"
    if prop == "place":
        return f"the {noun} is in the {value}"
    return f"the {noun} is {value}"


def is_reserved(*content: object) -> bool:
    """Whether a question's content is reserved for the test rows: about a fifth of all, by its hash.

    The corpus and the train and dev rows never contain reserved content, so the model has not met a test row
    in any wording.
    """
    text = "|".join(str(part) for part in content)
    return hashlib.sha256(text.encode()).digest()[0] < 51
