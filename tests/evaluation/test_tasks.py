"""The table of tasks, and its rules on the real rows of LLM-Adapters."""

import functools

import pytest

from milora_jax.data.records import read_records
from milora_jax.data.sources import Source
from milora_jax.errors import UserError
from milora_jax.evaluation.extraction import RULES
from milora_jax.evaluation.tasks import TASKS, find_task, require_golds, rule_for, task_named

COMMONSENSE = ("boolq", "ARC-Easy", "ARC-Challenge", "openbookqa")
MATH = ("AQuA", "gsm8k")


@functools.cache
def rows_of(shared_data, name):
    """The test file of a task, as LLM-Adapters has it."""
    return read_records(Source(name, str(shared_data / "llm_adapters" / name / "test.json")), scored=True)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("BoolQ", "boolq"),
        ("arc-e", "ARC-Easy"),
        ("ARC_easy", "ARC-Easy"),
        ("arc-c", "ARC-Challenge"),
        ("obqa", "openbookqa"),
        ("OpenBookQA", "openbookqa"),
        ("siqa", "social_i_qa"),
        ("social_i_qa", "social_i_qa"),
        ("Social IQa", "social_i_qa"),
        ("aqua", "AQuA"),
        ("aqua_rat", "AQuA"),
        ("GSM8K", "gsm8k"),
        ("svamp", "SVAMP"),
    ],
)
def test_a_task_has_many_spellings(spelling, name):
    assert task_named(spelling).name == name


def test_every_task_is_found_by_its_names_and_has_a_rule():
    for task in TASKS:
        for name in (task.name, task.title, *task.aliases):
            assert find_task(name) is task
        assert task.rule in RULES
        assert task.max_new_tokens == (256 if task.rule in ("number", "letter") else 32)
        assert task.file == f"dataset/{task.name}/test.json"


@pytest.mark.parametrize(("wrong", "near"), [("bolq", "boolq"), ("arc-easi", "ARC-Easy"), ("gsm-8", "gsm8k")])
def test_an_unknown_task_is_refused_with_the_nearest_name(wrong, near):
    with pytest.raises(UserError, match=rf"no task is called '{wrong}': .* \(did you mean '{near}'\?\)"):
        task_named(wrong)


def test_a_rule_is_found_by_name_or_by_the_golds():
    assert rule_for("GSM8K", ["x"]).name == "number"
    assert rule_for("ARC-Challenge", ["answer1"]).name == "answer"
    assert rule_for("mine", ["ending1", "ending4"]).name == "ending"
    assert rule_for("mine", ["ending1", "ending4"], only_strict=True).name == "ending_strict"


@pytest.mark.thorough
@pytest.mark.parametrize("name", [*COMMONSENSE, *MATH])
def test_the_real_file_has_the_published_number_of_rows_and_golds_of_its_task(shared_data, name):
    golds = [record.answer for record in rows_of(shared_data, name)]
    for only_strict in (False, True):
        rule = rule_for(name, golds, only_strict)
        assert all(rule.is_gold(gold) for gold in golds)
        assert require_golds(name, golds, rule) == ""


@pytest.mark.parametrize("name", [*COMMONSENSE, *MATH])
def test_every_real_gold_answer_extracts_to_itself(shared_data, name):
    rule = rule_for(name, [])
    for record in rows_of(shared_data, name):
        assert rule.extract(record.answer) == record.answer
        assert rule.matches(rule.extract(record.answer), record.answer)


@pytest.mark.parametrize("name", COMMONSENSE)
def test_every_real_gold_output_extracts_to_its_answer(shared_data, name):
    for only_strict in (False, True):
        rule = rule_for(name, [], only_strict)
        for record in rows_of(shared_data, name):
            assert record.output == f"the correct answer is {record.answer}"
            assert rule.extract(record.output) == record.answer


def test_the_outputs_of_the_math_files_are_rationales_of_another_model(shared_data):
    """They are no gold outputs: docs/evaluation.md gives these numbers."""
    right = {}
    for name in MATH:
        records = rows_of(shared_data, name)
        for only_strict in (False, True):
            rule = rule_for(name, [], only_strict)
            read = [rule.matches(rule.extract(record.output), record.answer) for record in records]
            right[rule.name] = sum(read)
        assert ("" in [record.output for record in records]) == (name == "gsm8k")
    assert right == {"letter": 109, "letter_strict": 123, "number": 771}


def test_strict_letters_read_the_gold_in_the_words_of_the_rationales(shared_data):
    rule = rule_for("AQuA", [], only_strict=True)
    for record in rows_of(shared_data, "AQuA"):
        assert rule.extract(f"A and B are wrong.The answer is ({record.answer}).") == record.answer


def test_rows_of_another_task_are_refused(shared_data):
    with pytest.raises(
        UserError, match=r"none of the 254 answers is one of task 'gsm8k' \(the first is 'A'\)"
    ):
        require_golds("gsm8k", [r.answer for r in rows_of(shared_data, "AQuA")], rule_for("gsm8k", []))
    for name, other in (("boolq", "ARC-Easy"), ("AQuA", "gsm8k"), ("gsm8k", "ARC-Easy"), ("piqa", "boolq")):
        golds = [record.answer for record in rows_of(shared_data, other)]
        with pytest.raises(UserError, match="rows of your own need another name, NAME=FILE"):
            require_golds(name, golds, rule_for(name, golds))


def test_what_is_unusual_is_said():
    rule = rule_for("boolq", [])
    assert require_golds("boolq", ["true"], rule) == "boolq: 1 rows, LLM-Adapters' test file has 3270"
    assert "1 of 2 gold answers cannot be read (the first is 'yes')" in require_golds(
        "boolq", ["true", "yes"], rule
    )
    assert require_golds("mine", ["yes"], rule_for("mine", ["yes"])) == ""
