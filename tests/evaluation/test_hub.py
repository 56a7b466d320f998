"""Rows of the Hub become the rows of LLM-Adapters, letter by letter."""

import json
import re
import sys
from types import SimpleNamespace

import pytest

from milora_jax.errors import UserError
from milora_jax.evaluation import hub
from milora_jax.evaluation.extraction import RULES
from milora_jax.evaluation.hub import SOURCES, as_record, hub_records
from milora_jax.evaluation.tasks import TASKS, task_named

LABELS = ["A", "B", "C", "D", "E"]

EXAMPLES = {
    "boolq": (
        {"question": "is rain wet", "passage": "Rain is water.", "answer": True},
        "Please answer the following question with true or false, question: is rain wet?"
        "\n\nAnswer format: true/false",
        "true",
    ),
    "piqa": (
        {"goal": "Dry a cup.", "sol1": "Use a towel.", "sol2": "Use soup.", "label": 1},
        "Please choose the correct solution to the question: Dry a cup.\n\nSolution1: Use a towel.\n\n"
        "Solution2: Use soup.\n\nAnswer format: solution1/solution2",
        "solution2",
    ),
    "social_i_qa": (
        {
            "context": "Kim moved.",
            "question": "How is Kim?",
            "answerA": "new",
            "answerB": "old",
            "answerC": "red",
            "label": "3",
        },
        "Please choose the correct answer to the question: Kim moved. How is Kim?\n\n"
        "Answer1: new Answer2: old Answer3: red\n\nAnswer format: answer1/answer2/answer3",
        "answer3",
    ),
    "hellaswag": (
        {
            "activity_label": "Travel",
            "ctx": "He packs. He",
            "endings": ["goes.", "s", "t", "u"],
            "label": "0",
        },
        "Please choose the correct ending to complete the given sentence: Travel: He packs. He\n\n"
        "Ending1: goes. Ending2: s Ending3: t Ending4: u\n\nAnswer format: ending1/ending2/ending3/ending4",
        "ending1",
    ),
    "winogrande": (
        {"sentence": "Ann fed Bo as _ was kind.", "option1": "Ann", "option2": "Bo", "answer": "1"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        "Ann fed Bo as _ was kind.\n\nOption1: Ann Option2: Bo Answer format: option1/option2",
        "option1",
    ),
    "ARC-Easy": (
        {"question": "What is wet?", "choices": {"text": ["sun", "rain", "sand"], "label": ["1", "2", "3"]}}
        | {"answerKey": "2"},
        "Please choose the correct answer to the question: What is wet?\n\n"
        "Answer1: sun Answer2: rain Answer3: sand\n\nAnswer format: answer1/answer2/answer3",
        "answer2",
    ),
    "ARC-Challenge": (
        {"question": "Which?", "choices": {"text": list("vwxyz"), "label": LABELS}, "answerKey": "E"},
        "Please choose the correct answer to the question: Which?\n\n"
        "Answer1: v Answer2: w Answer3: x Answer4: y Answer5: z\n\n"
        "Answer format: answer1/answer2/answer3/answer4/answer5",
        "answer5",
    ),
    "openbookqa": (
        {
            "question_stem": "Dogs eat",
            "choices": {"text": list("wxyz"), "label": LABELS[:4]},
            "answerKey": "A",
        },
        "Please choose the correct answer to the question: Dogs eat\n\nAnswer1: w Answer2: x Answer3: y "
        "Answer4: z\n\nAnswer format: answer1/answer2/answer3/answer4",
        "answer1",
    ),
    "AQuA": (
        {
            "question": "What is 2 + 2?",
            "options": ["A)3", "B)4", "C) 5 (five)", "D)6", "E)7"],
            "rationale": "4",
            "correct": "B",
        },
        "What is 2 + 2? Answer Choices: (A) 3 (B) 4 (C)  5 (five) (D) 6 (E) 7",
        "B",
    ),
    "gsm8k": (
        {"question": "How many?", "answer": "Two <<1+1=2>>2.\n#### 1,002"},
        "How many?",
        "1002.0",
    ),
    "SVAMP": (
        {"Body": "Ann has 8 pens. Bo has 3 ", "Question": "How many more has Ann?", "Answer": "5.0"},
        "Ann has 8 pens. Bo has 3. How many more has Ann?",
        "5.0",
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_made_up_row_is_worded_as_llm_adapters_words_it(name):
    row, instruction, answer = EXAMPLES[name]
    task = task_named(name)
    record = as_record(task, SOURCES[name], row, 1)
    assert (record.instruction, record.input, record.answer) == (instruction, "", answer)
    assert RULES[task.rule].is_gold(answer)
    assert RULES[task.rule].extract(record.output) == answer


def real_rows(shared_data, name):
    return json.loads((shared_data / "llm_adapters" / name / "test.json").read_text())


def raw_row(name, row):
    """The row of the Hub that a row of LLM-Adapters was made of, as far as it shows."""
    instruction, answer = row["instruction"], row["answer"]
    if name == "boolq":
        question = re.fullmatch(r"Please .* question: (.*)\?\n\nAnswer format: true/false", instruction)[1]
        return {"question": question, "answer": answer == "true", "passage": ""}
    if name == "AQuA":
        question, _, texts = instruction.rpartition(" Answer Choices: ")
        parts = re.fullmatch(r"\(A\) (.*) \(B\) (.*) \(C\) (.*) \(D\) (.*) \(E\) (.*)", texts).groups()
        options = [f"{letter}){part}" for letter, part in zip(LABELS, parts, strict=True)]
        return {"question": question, "options": options, "rationale": "", "correct": answer}
    found = re.fullmatch(
        r"Please .*? question: (.*)\n\n(Answer1: .*)\n\nAnswer format: .*", instruction, re.S
    )
    texts = re.split(r" ?Answer\d: ", found[2])[1:]
    choices = {"text": texts, "label": LABELS[: len(texts)]}
    field = "question_stem" if name == "openbookqa" else "question"
    return {field: found[1], "choices": choices, "answerKey": LABELS[int(answer[-1]) - 1]}


@pytest.mark.parametrize("name", ["boolq", "ARC-Easy", "ARC-Challenge", "openbookqa", "AQuA"])
def test_every_real_row_is_made_again_from_its_parts(shared_data, name):
    for number, row in enumerate(real_rows(shared_data, name), 1):
        record = as_record(task_named(name), SOURCES[name], raw_row(name, row), number)
        assert (record.instruction, record.answer) == (row["instruction"], row["answer"])
        assert name == "AQuA" or record.output == row["output"]


def test_every_raw_row_of_gsm8k_is_a_row_of_llm_adapters(shared_data):
    raw = [json.loads(line) for line in (shared_data / "gsm8k" / "test.jsonl").read_text().splitlines()]
    records = [as_record(task_named("gsm8k"), SOURCES["gsm8k"], row, i) for i, row in enumerate(raw, 1)]
    theirs = {(row["instruction"], row["answer"]) for row in real_rows(shared_data, "gsm8k")}
    assert {(record.instruction, record.answer) for record in records} == theirs


@pytest.fixture
def loaded(monkeypatch):
    """What ``datasets.load_dataset`` was asked for; it gives the made-up rows."""
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return [row for task, (row, _, _) in EXAMPLES.items() if SOURCES[task].name == name] * 2

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_rows_are_loaded_by_the_names_of_the_hub(loaded):
    assert [record.answer for record in hub_records(task_named("siqa"))] == ["answer3"] * 2
    assert len(hub_records(task_named("gsm8k"))) == 2
    assert loaded == [("lighteval/siqa", None, "validation"), ("openai/gsm8k", "main", "test")]


def test_what_has_no_rows_on_the_hub_names_its_file(loaded):
    for task in TASKS:
        if task.name not in SOURCES:
            with pytest.raises(
                UserError, match=rf"no rows on the Hub: give --data FILE, which is {task.file}"
            ):
                hub_records(task)
    assert not loaded


def test_without_a_network_one_line_names_the_file(monkeypatch):
    def load_dataset(name, config, split):
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub\nmore")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UserError) as caught:
        hub_records(task_named("boolq"))
    assert str(caught.value) == (
        "task 'boolq': data set 'google/boolq' cannot be loaded from the Hub: "
        "Couldn't reach 'google/boolq' on the Hub; or give --data FILE, which is "
        "dataset/boolq/test.json of the LLM-Adapters repository"
    )


def test_without_the_package_one_line_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs the package datasets: pip install datasets; or give --data"):
        hub_records(task_named("boolq"))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("boolq", {"question": None}, "no field 'question'"),
        ("ARC-Easy", {"answerKey": "Z"}, "'Z' is not in list"),
        ("gsm8k", {"answer": "no number"}, "could not convert"),
        ("SVAMP", {"Answer": None}, "no field 'Answer'"),
    ],
)
def test_a_row_of_other_fields_is_named(name, change, message):
    row = {key: value for key, value in {**EXAMPLES[name][0], **change}.items() if value is not None}
    with pytest.raises(UserError) as caught:
        as_record(task_named(name), SOURCES[name], row, 7)
    assert str(caught.value).startswith(f"{SOURCES[name].name} (row 7): not a row of task {name!r}: ")
    assert message in str(caught.value)


def test_every_source_is_of_a_task():
    assert set(SOURCES) <= {task.name for task in TASKS}
    assert hub.form("answer", 2) == "Answer format: answer1/answer2"
