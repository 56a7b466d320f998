"""Reading answers out of text, as LLM-Adapters does."""

import pytest

from milora_jax.data.records import Source, read_records
from milora_jax.evaluation.extraction import RULES, rule_for

CASES = [
    ("true_false", "the correct answer is true", "true"),
    ("true_false", "false, not true", "false"),
    ("true_false", "True", ""),
    ("answer", "the correct answer is answer3 or answer1", "answer3"),
    ("answer", "answer 3", ""),
    ("solution", "solution2", "solution2"),
    ("ending", "it is ending4.", "ending4"),
    ("option", "option1", "option1"),
    ("number", "3 and 4 make 7.", "7."),
    ("number", "It costs $1,234.50", "1234.50"),
    ("number", "-5 degrees", "-5"),
    ("number", "none", ""),
    ("letter", "Because it is B", "B"),
    ("letter", "answer is (D)", "D"),
    ("letter_strict", "Because the answer is (D)", "D"),
    ("letter_strict", "D", ""),
    ("text", "  dog, cat \n", "dog, cat"),
]


@pytest.mark.parametrize(("rule", "text", "expected"), CASES)
def test_what_is_read(rule, text, expected):
    assert RULES[rule].extract(text) == expected


@pytest.mark.parametrize(
    ("rule", "prediction", "gold", "right"),
    [
        ("number", "7.", "7", True),
        ("number", "7.0005", "7", True),
        ("number", "7.01", "7", False),
        ("number", "", "7", False),
        ("number", "1234", "1,234", True),
        ("answer", "answer1", "answer1", True),
        ("answer", "", "answer1", False),
        ("text", "a b", " a b ", True),
        ("text", "a  b", "a b", False),
    ],
)
def test_what_counts_as_right(rule, prediction, gold, right):
    assert RULES[rule].matches(prediction, gold) is right


def test_a_rule_is_found_by_name_or_by_the_golds():
    assert rule_for("GSM8K", ["x"]).name == "number"
    assert rule_for("ARC-Challenge", ["answer1"]).name == "answer"
    assert rule_for("mine", ["ending1", "ending4"]).name == "ending"
    assert rule_for("mine", ["12", "word"]).name == "text"


@pytest.mark.parametrize("task", ["boolq", "ARC-Easy", "openbookqa"])
def test_every_real_gold_output_scores_as_right(shared_data, task):
    records = read_records(Source(task, str(shared_data / "llm_adapters" / task / "test.json")), scored=True)
    rule = rule_for(task, [record.answer for record in records])
    assert all(rule.matches(rule.extract(record.output), record.answer) for record in records)


@pytest.mark.parametrize("task", ["AQuA", "gsm8k"])
def test_every_real_gold_answer_scores_as_right(shared_data, task):
    """Their outputs are rationales of another model, many of them wrong."""
    records = read_records(Source(task, str(shared_data / "llm_adapters" / task / "test.json")), scored=True)
    rule = rule_for(task, [record.answer for record in records])
    assert all(rule.matches(rule.extract(record.answer), record.answer) for record in records)
