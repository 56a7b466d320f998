"""Reading answers out of text, as LLM-Adapters does."""

import pytest

from milora_jax.evaluation.extraction import CHOICES, NARROWEST_FIRST, RULES, narrowest_rule, strict

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


@pytest.mark.parametrize(
    ("rule", "text", "original", "read"),
    [
        ("letter", "Because the answer is (D)", "B", "D"),
        ("letter", "the answer is D.", "D", "D"),
        ("letter", "the answer is Dry", "D", ""),
        ("letter", "Answer: D", "A", ""),
        ("true_false", "a falsehood, so true", "false", "true"),
        ("true_false", "untrue", "true", ""),
        ("answer", "the correct answer is answer12", "answer1", ""),
        ("answer", "the correct answer is answer2.", "answer2", "answer2"),
        ("ending", "ending45, ending3", "ending4", "ending3"),
        ("solution", "solution20", "solution2", ""),
        ("option", "myoption1 or option2", "option1", "option2"),
    ],
)
def test_where_the_strict_rule_reads_something_else(rule, text, original, read):
    assert RULES[rule].extract(text) == original
    assert strict(RULES[rule]).extract(text) == read


@pytest.mark.parametrize("name", CHOICES)
def test_a_strict_rule_reads_the_answers_of_the_data_as_the_original_does(name):
    sentence = "the answer is ({})" if name == "letter" else "the correct answer is {}"
    for rule in (RULES[name], strict(RULES[name])):
        for option in CHOICES[name]:
            assert rule.extract(sentence.format(option)) == option
            assert rule.is_gold(option)
            assert not rule.is_gold(f"{option}x")


def test_numbers_and_texts_have_no_strict_rule():
    assert strict(RULES["number"]) is RULES["number"]
    assert strict(RULES["text"]) is RULES["text"]


@pytest.mark.parametrize(
    ("golds", "name"),
    [
        (["true", "false"], "true_false"),
        (["ending1", "ending4"], "ending"),
        (["12", "-3.5", "1,234", " 7. "], "number"),
        (["12", "word"], "text"),
        (["A", "E"], "letter"),
        (["A", "F"], "text"),
    ],
)
def test_a_rule_is_found_by_the_golds(golds, name):
    assert narrowest_rule(golds).name == name


def test_every_rule_is_looked_for():
    assert sorted(NARROWEST_FIRST) == sorted(RULES)
