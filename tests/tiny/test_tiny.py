"""The embedded model and tasks: sizes, disjoint rows, and that the commands make them again."""

import json

import jax
import numpy as np
import pytest

from milora_jax.base.hf_config import read_model_config
from milora_jax.commands.tiny import SEED
from milora_jax.console import Console
from milora_jax.data.records import read_records
from milora_jax.data.sources import Source
from milora_jax.data.tokens import encode_records, load_tokenizer
from milora_jax.evaluation.tasks import rule_for
from milora_jax.prompt_format import PromptFormat
from milora_jax.tiny import MODEL_DIR, TASKS, TASKS_DIR, corpus, wide
from milora_jax.tiny.pretrain import CONFIG, STAGES, batches, pretrain
from milora_jax.tiny.tasks import ROWS, make_task
from milora_jax.tiny.world import ACTIONS, FACTS

RULES = {
    "true_false": "true_false",
    "multiple_choice": "answer",
    "completion": "ending",
    "arithmetic": "number",
    "word_order": "text",
}


def rows_of(task, split):
    return [json.loads(line) for line in (TASKS_DIR / task / f"{split}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task", TASKS)
def test_the_rows_are_those_of_the_command_and_the_splits_are_disjoint(task):
    made = make_task(task, SEED)
    for split, count in ROWS.items():
        assert rows_of(task, split) == made[split]
        assert len(made[split]) == count
        assert all(set(row) == {"instruction", "input", "output", "answer"} for row in made[split])
    asked = {split: {row["instruction"] for row in rows} for split, rows in made.items()}
    assert not asked["train"] & asked["dev"]
    assert not asked["train"] & asked["test"]
    assert not asked["dev"] & asked["test"]
    assert [len(asked[split]) for split in ("dev", "test")] == [ROWS["dev"], ROWS["test"]]


@pytest.mark.parametrize("task", TASKS)
def test_every_gold_output_scores_as_right_and_no_answer_dominates(task):
    records = read_records(Source(task, str(TASKS_DIR / task / "test.jsonl")))
    rule = rule_for(task, [record.answer for record in records])
    assert rule.name == RULES[task]
    assert all(rule.matches(rule.extract(record.output), record.answer) for record in records)
    for split in ROWS:
        _, counts = np.unique([row["answer"] for row in rows_of(task, split)], return_counts=True)
        assert counts.max() <= 0.65 * ROWS[split]


def test_the_answers_follow_from_the_world():
    for row in rows_of("multiple_choice", "test"):
        question, options = row["instruction"].split("\n")
        prop, noun = question.split("What is the ")[1].rstrip("?").split(" of the ")
        right = options.split(f"Answer{row['answer'][-1]}: ")[1].split(" ")[0]
        assert FACTS[noun][prop] == right
    for row in rows_of("completion", "test"):
        feeling = row["instruction"].split(" was ")[1].split(",")[0]
        assert f"Ending{row['answer'][-1]}: {ACTIONS[feeling]}" in row["instruction"]
    for row in rows_of("arithmetic", "test"):
        a, sign, b = row["output"].split(" ")[:3]
        assert row["answer"] == str(int(a) + int(b) if sign == "+" else int(a) - int(b))


@pytest.mark.thorough
def test_the_corpus_holds_no_instruction_and_no_reserved_question():
    rng = np.random.default_rng(1)
    plain = [corpus.document(rng) for _ in range(3000)]
    mixed = ["".join(piece.text for piece in wide.document(rng)) for _ in range(3000)]
    assert not any("true" in text or "nswer" in text or "nstruction" in text for text in plain)
    for task in TASKS:
        for row in rows_of(task, "test"):
            tail = row["instruction"].split(": ", 1)[-1]
            assert not any(tail in text for text in plain + mixed), tail


@pytest.mark.thorough
def test_the_model_is_small_whole_and_its_tokenizer_writes_anything():
    size = sum(path.stat().st_size for path in MODEL_DIR.iterdir())
    assert size <= 8 * 2**20
    assert sum(path.stat().st_size for path in TASKS_DIR.rglob("*.jsonl")) <= 2.5 * 2**20
    assert read_model_config(MODEL_DIR) == CONFIG
    tokenizer = load_tokenizer(str(MODEL_DIR))
    assert len(tokenizer) <= CONFIG.vocab_size
    text = 'Fox 42 + 7 = 49,\n"naïve" 世界'
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)).strip() == text
    for task in TASKS:
        records = read_records(Source(task, str(TASKS_DIR / task / "train.jsonl")))
        _, dropped = encode_records(tokenizer, records, CONFIG, 160, PromptFormat(special_tokens="bos"))
        assert dropped == 0


@pytest.mark.thorough
def test_batches_hold_whole_documents_and_follow_from_the_seed():
    tokenizer = load_tokenizer(str(MODEL_DIR))
    for stage in STAGES:
        (one, learnt), again, other = (next(batches(tokenizer, stage, 1, (seed, 1))) for seed in (0, 0, 5))
        np.testing.assert_array_equal(one, again[0])
        assert (one != other[0]).any()
        begins, ends = one == tokenizer.bos_token_id, one == tokenizer.eos_token_id
        assert begins[:, 0].all()
        assert (begins.sum(1) == ends.sum(1)).all()
        assert learnt[ends].all()
        assert not learnt[begins | (one == tokenizer.pad_token_id)].any()


def test_answers_are_learnt_and_questions_given():
    tokenizer = load_tokenizer(str(MODEL_DIR))
    tokens, learnt = next(batches(tokenizer, STAGES[1], 1, (0, 1)))
    given, wanted = tokenizer.decode(tokens[~learnt]), tokenizer.decode(tokens[learnt])
    assert "Option2" in given
    assert "option2" in wanted
    assert "Option2" not in wanted
    assert learnt.mean() > 0.15


@pytest.mark.slow
def test_pretraining_writes_a_directory_that_loads(tmp_path):
    losses = [pretrain(tmp_path, steps, 3, Console()) for steps in (4, 40)]
    assert losses[1] < losses[0]
    from milora_jax import load_base

    base, config = load_base(tmp_path)
    assert config == CONFIG
    assert 1_000_000 <= sum(leaf.size for leaf in jax.tree.leaves(base)) <= 4_000_000
