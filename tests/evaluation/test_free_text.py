"""BLEU, chrF and ROUGE-L over several references, and which rows are free text."""

import importlib.util
import json

import pytest
import sacrebleu

from milora_jax.data.records import Record
from milora_jax.errors import UserError
from milora_jax.evaluation.free_text import is_free_text, references_of, require_text_packages, text_measures
from milora_jax.evaluation.report import figures_table, score_table
from milora_jax.evaluation.score import Prediction, TaskScore, figures, measures_of
from milora_jax.evaluation.tasks import rule_for

REFERENCES = [
    ["the cat sat on a mat", "a cat sat on the mat"],
    ["There is a coffee shop called Blue Spice."],
    ["runs every day", "he is running", "it runs"],
]
GENERATED = ["the cat sat on the mat", "Blue Spice is a coffee shop.", "run every day"]


def test_bleu_counts_the_ngrams_of_all_references():
    """5 of 6 words ("the" is there once in either), and all longer sequences, each in one of the two."""
    found = text_measures(GENERATED[:1], REFERENCES[:1])
    assert found.bleu == pytest.approx(100 * (5 / 6) ** 0.25)
    one = text_measures(GENERATED[:1], [REFERENCES[0][:1]])
    assert one.bleu == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)


def test_rouge_l_is_that_of_the_best_reference_unstemmed():
    assert text_measures(["the cat"], [["a dog", "The black cat!"]]).rouge_l == pytest.approx(100 * 0.8)
    assert text_measures(["the cat"], [["The black cat!", "a dog"]]).rouge_l == pytest.approx(100 * 0.8)
    assert text_measures(["run"], [["runs"]]).rouge_l == 0
    assert text_measures(["run", "the cat"], [["runs"], ["the black cat"]]).rouge_l == pytest.approx(40)


def test_rows_may_have_different_numbers_of_references():
    found = text_measures(GENERATED, REFERENCES)
    streams = [
        [REFERENCES[0][0], REFERENCES[1][0], REFERENCES[2][0]],
        [REFERENCES[0][1], None, REFERENCES[2][1]],
        [None, None, REFERENCES[2][2]],
    ]
    assert found.bleu == sacrebleu.corpus_bleu(GENERATED, streams).score
    assert found.chrf == sacrebleu.corpus_chrf(GENERATED, streams).score
    assert found.bleu_signature.startswith("nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert found.chrf_signature.startswith("nrefs:var|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")
    first = text_measures(GENERATED, [row[:1] for row in REFERENCES])
    assert (first.bleu, first.chrf, first.rouge_l) < (found.bleu, found.chrf, found.rouge_l)


def test_the_right_texts_have_all_and_empty_ones_nothing():
    right = text_measures([row[-1] for row in REFERENCES[:2]], REFERENCES[:2])
    assert (right.bleu, right.chrf, right.rouge_l) == pytest.approx((100, 100, 100))
    empty = text_measures(["", ""], REFERENCES[:2])
    assert (empty.bleu, empty.chrf, empty.rouge_l) == (0, 0, 0)


def rows(*outputs, answer=None, references=()):
    return [Record("ask", "", each, answer or each.strip(), references=references) for each in outputs]


@pytest.mark.parametrize(
    ("name", "records", "expected"),
    [
        ("mine", rows("The city centre has a coffee shop."), True),
        ("mine", rows("train, kiwi, frog", "tin, pan, pot"), False),
        ("mine", rows("one two three four five", "no", "no"), False),
        ("mine", rows("one two three four five", "six seven eight nine ten", "no"), True),
        ("mine", rows("Two and two make the number four.", answer="4"), False),
        ("gsm8k", rows("Two and two make the number four.", answer="4"), False),
        ("gsm8k", rows("It is many, and I cannot say.", answer="It is many, and no number"), False),
        ("mine", rows("yes", references=("yes", "yes, it is")), True),
        ("boolq", rows("true", references=("true", "yes")), True),
    ],
)
def test_which_rows_are_free_text(name, records, expected):
    assert is_free_text(rule_for(name, [record.answer for record in records]), records) is expected


def test_answers_are_compared_with_the_references_else_the_output_else_the_answer():
    assert references_of(rows("one", references=("two", "three"))[0]) == ("two", "three")
    assert references_of(rows("one", answer="1")[0]) == ("one",)
    assert references_of(rows(" ", answer="1")[0]) == ("1",)


def test_real_rows(shared_data):
    """Every set of real sentences about one restaurant is free text, and its own references are right."""
    path = shared_data / "e2e_cleaned" / "test.jsonl"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    found = [json.loads(line) for line in path.read_text().splitlines()[:200]]
    records = [
        Record(row["instruction"], row["input"], row["output"], row["answer"], (), tuple(row["references"]))
        for row in found
    ]
    assert max(len(record.references) for record in records) > 1
    assert is_free_text(rule_for("e2e", [record.answer for record in records]), records)
    answers = [prediction("e2e", record.references[-1]) for record in records]
    right = measures_of(answers, records)
    assert (right.bleu, right.chrf, right.rouge_l) == pytest.approx((100, 100, 100))
    shifted = measures_of([*answers[1:], answers[0]], records)
    assert shifted.bleu < 60
    assert shifted.rouge_l < 80


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    require_text_packages()
    missing = {"rouge_score"}
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else there(name))
    with pytest.raises(UserError, match="need the package rouge-score: pip install rouge-score"):
        require_text_packages()


def prediction(task, generated):
    return Prediction(task, 0, "ask", "1", generated, "text", generated, False, False, None)


def test_the_tables_of_free_text():
    answers = [prediction("e2e", text) for text in GENERATED]
    text = text_measures(GENERATED, REFERENCES)
    scores = [TaskScore("sums", answers), TaskScore("e2e", answers, None, text)]
    found = figures(scores)
    assert found["measures"] == {"e2e": {**vars(text)}}
    found["loss"] = {"sums": 0.5, "e2e": None}
    found["perplexity"] = {"sums": 123456.0, "e2e": None}
    after = {**found, "accuracy": {"sums": 1.0, "e2e": 0.5, "mean": 0.75}}
    assert figures_table(found, after) == "\n".join(
        [
            "                     accuracy                loss          perplexity",
            "task           base   adapter      base   adapter      base   adapter",
            "-" * 69,
            "sums           0.0%    100.0%     0.500     0.500   1.2e+05   1.2e+05",
            "e2e            0.0%     50.0%         -         -         -         -",
            "-" * 69,
            "mean           0.0%     75.0%",
            "",
            "                         BLEU                chrF             ROUGE-L",
            "free text      base   adapter      base   adapter      base   adapter",
            "-" * 69,
            f"e2e      {text.bleu:10.1f}{text.bleu:10.1f}{text.chrf:10.1f}{text.chrf:10.1f}"
            f"{text.rouge_l:10.1f}{text.rouge_l:10.1f}",
        ]
    )
    lines = score_table(scores).splitlines()
    assert lines[0].split()[-5:] == ["loss", "perplexity", "BLEU", "chrF", "ROUGE-L"]
    assert lines[2].split()[-5:] == ["-", "-", *(f"{v:.1f}" for v in (text.bleu, text.chrf, text.rouge_l))]
    assert lines[1].split()[-2:] == ["-", "-"]
    assert max(map(len, lines)) <= 100
