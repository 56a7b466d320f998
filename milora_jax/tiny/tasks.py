"""The five instruction tasks: disjoint train, dev and test rows in the LLM-Adapters schema."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np

from milora_jax.tiny import TASKS, corpus
from milora_jax.tiny.world import is_reserved, statement

ROWS = {"train": 1500, "dev": 40, "test": 100}
"""Rows of each split of each task."""


LEAD = "the correct answer is "
"""The beginning of an answer to a choice in LLM-Adapters."""

Maker: TypeAlias = Callable[[np.random.Generator], tuple[dict[str, str], bool]]
"""Draws a row, and says whether its content is reserved for the test rows."""


def row_of(instruction: str, output: str, answer: str) -> dict[str, str]:
    """Make a row in the LLM-Adapters schema."""
    return {"instruction": instruction, "input": "", "output": output, "answer": answer}


def _true_false(rng: np.random.Generator) -> tuple[dict[str, str], bool]:
    noun, prop, value, holds = corpus.draw_fact(rng)
    question = statement(noun, prop, value).replace(f"the {noun} is", f"Is the {noun}")
    answer = "true" if holds else "false"
    text = f"Please answer the following question with true or false, question: {question}?"
    return row_of(text, answer, answer), is_reserved(noun, prop, value)


def listed_options(label: str, options: list[str]) -> str:
    """List options after a label and their numbers, from 1."""
    return " ".join(f"{label}{i}: {option}" for i, option in enumerate(options, 1))


def _multiple_choice(rng: np.random.Generator) -> tuple[dict[str, str], bool]:
    noun, prop, options, place = corpus.draw_choice(rng)
    text = (
        "Please choose the correct answer to the question: "
        f"What is the {prop} of the {noun}?\n{listed_options('Answer', options)}"
    )
    answer = f"answer{place + 1}"
    return row_of(text, f"{LEAD}{answer}", answer), is_reserved(noun, prop, *options)


def _completion(rng: np.random.Generator) -> tuple[dict[str, str], bool]:
    name, feeling, options, place = corpus.draw_story(rng)
    text = (
        "Please choose the correct ending to complete the given sentence: "
        f"{name} was {feeling}, so {name}\n{listed_options('Ending', options)}"
    )
    answer = f"ending{place + 1}"
    return row_of(text, f"{LEAD}{answer}", answer), is_reserved(name, feeling, *options)


def _arithmetic(rng: np.random.Generator) -> tuple[dict[str, str], bool]:
    first, second, things, a, sign, b = corpus.draw_sum(rng)
    change = f"{second} brings {b} more" if sign == "+" else f"{second} takes {b}"
    text = f"{first} has {a} {things}. {change}. How many {things} are there now?"
    total = str(corpus.result(a, sign, b))
    output = f"{a} {sign} {b} = {total}. The answer is {total}."
    return row_of(text, output, total), is_reserved(first, second, things, a, sign, b)


def _word_order(rng: np.random.Generator) -> tuple[dict[str, str], bool]:
    words = corpus.draw_words(rng)
    answer = ", ".join(reversed(words))
    text = f"Write these words in reverse order: {', '.join(words)}"
    return row_of(text, answer, answer), is_reserved(*words)


MAKERS: dict[str, Maker] = dict(
    zip(TASKS, (_true_false, _multiple_choice, _completion, _arithmetic, _word_order), strict=True)
)


def make_task(
    name: str, seed: int, rows: Mapping[str, int] = ROWS, makers: Mapping[str, Maker] = MAKERS
) -> dict[str, list[dict[str, str]]]:
    """Make the rows of a task by split, as many as ``rows`` says.

    No instruction is in two splits, and none is twice in dev or test. Training rows may repeat: there are
    only some 200 true statements about the world that are not reserved, and without repeats seven of eight
    answers to learn would be "false".
    """
    rng = np.random.default_rng([seed, TASKS.index(name)])
    splits: dict[str, list[dict[str, str]]] = {split: [] for split in rows}
    home: dict[str, str] = {}
    while any(len(splits[split]) < count for split, count in rows.items()):
        row, reserved = makers[name](rng)
        text = row["instruction"]
        choices = ("test",) if reserved else ("dev", "train")
        if text in home:
            choices = ("train",) if home[text] == "train" else ()
        for split in choices:
            if len(splits[split]) < rows[split]:
                splits[split].append(row)
                home[text] = split
                break
    return splits


def write_tasks(
    directory: Path, seed: int, rows: Mapping[str, int] = ROWS, makers: Mapping[str, Maker] = MAKERS
) -> None:
    """Write ``NAME/{train,dev,test}.jsonl`` for every task."""
    for name in TASKS:
        (directory / name).mkdir(parents=True, exist_ok=True)
        for split, made in make_task(name, seed, rows, makers).items():
            lines = "".join(json.dumps(row) + "\n" for row in made)
            (directory / name / f"{split}.jsonl").write_text(lines, encoding="utf-8")
