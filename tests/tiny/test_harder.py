"""The harder tasks: disjoint rows, answers that follow from the world, and none that dominates."""

import re

import numpy as np
import pytest

from milora_jax.data.records import read_records
from milora_jax.data.sources import Source
from milora_jax.data.tokens import encode_records, load_tokenizer
from milora_jax.evaluation.tasks import rule_for
from milora_jax.prompt_format import PromptFormat
from milora_jax.tiny import MODEL_DIR, TASKS
from milora_jax.tiny.harder import MAKERS, ROWS
from milora_jax.tiny.pretrain import CONFIG
from milora_jax.tiny.tasks import make_task, write_tasks
from milora_jax.tiny.world import ACTIONS, FACTS


@pytest.fixture(scope="module")
def made():
    return {task: make_task(task, 3, ROWS, MAKERS) for task in TASKS}


@pytest.mark.parametrize("task", TASKS)
def test_splits_are_disjoint_and_no_answer_dominates(made, task):
    asked = {split: {row["instruction"] for row in rows} for split, rows in made[task].items()}
    assert not asked["train"] & (asked["dev"] | asked["test"])
    assert not asked["dev"] & asked["test"]
    assert [len(asked[split]) for split in ("dev", "test")] == [ROWS["dev"], ROWS["test"]]
    for split, rows in made[task].items():
        assert len(rows) == ROWS[split]
        _, counts = np.unique([row["answer"] for row in rows], return_counts=True)
        assert counts.max() <= 0.6 * len(rows)


def holds(statement):
    noun, said = statement.removeprefix("the ").split(" ", 1)
    return said.removeprefix("an ").removeprefix("a ").removeprefix("in the ") in FACTS[noun].values()


def test_the_answers_follow_from_the_world(made):
    for row in made["true_false"]["test"]:
        question = row["instruction"].split("question: Is ")[1].rstrip("?")
        assert (row["answer"] == "true") == all(map(holds, question.split(" and ")))
    for row in made["multiple_choice"]["test"]:
        question, options = row["instruction"].split("\n")
        said = question.split("Which of these is ")[1].rstrip("?")
        right = [bool(holds(f"the {noun} {said}")) for noun in re.findall(r"Answer\d: (\w+)", options)]
        assert right == [i == int(row["answer"][-1]) - 1 for i in range(4)]
    for row in made["completion"]["test"]:
        story = row["instruction"].split("sentence: ")[1]
        feels = dict(re.findall(r"(\w+) was (\w+)", story))
        asked = re.findall(r"so (\w+)\n", story)[0]
        assert f"Ending{row['answer'][-1]}: {ACTIONS[feels[asked]]}" in story
        assert all(ACTIONS[feeling] in story for feeling in feels.values())
    for row in made["arithmetic"]["test"]:
        numbers = re.findall(r"(has|brings|takes) (\d+)", row["instruction"])
        total = sum(-int(n) if verb == "takes" else int(n) for verb, n in numbers)
        assert row["answer"] == str(total)
        for a, sign, b, result in re.findall(r"(\d+) ([+-]) (\d+) = (-?\d+)\.", row["output"]):
            assert int(result) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
    for row in made["word_order"]["test"]:
        words = row["instruction"].split(": ")[1].split(", ")
        assert len(words) == 4
        assert row["answer"].split(", ") == words[::-1]


def test_they_are_written_as_records_that_fit_the_model(tmp_path):
    write_tasks(tmp_path, 3, {"train": 30, "dev": 5, "test": 20}, MAKERS)
    tokenizer = load_tokenizer(str(MODEL_DIR))
    for task in TASKS:
        records = read_records(Source(task, str(tmp_path / task / "test.jsonl")), scored=True)
        rule = rule_for(task, [record.answer for record in records])
        assert all(rule.matches(rule.extract(record.output), record.answer) for record in records)
        _, dropped = encode_records(tokenizer, records, CONFIG, 160, PromptFormat(special_tokens="bos"))
        assert dropped == 0
