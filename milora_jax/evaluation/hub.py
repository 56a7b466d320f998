"""Rows of the Hub in the form of LLM-Adapters.

The data sets have no loading scripts, which ``datasets`` does not run since version 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from milora_jax.data.records import Record
from milora_jax.data.rows import hub_rows
from milora_jax.errors import UserError
from milora_jax.evaluation.tasks import Task

Row = Mapping[str, Any]
Question = tuple[str, str]
"""Instruction and gold answer."""

OUTPUT = "the correct answer is {}"
"""The output of LLM-Adapters' commonsense rows; it is not read where a row is scored."""


def options(word: str, texts: Sequence[str], separator: str = " ") -> str:
    """Numbered options.

    >>> options("Answer", ["a dog", "a cat"])
    'Answer1: a dog Answer2: a cat'
    """
    return separator.join(f"{word}{i}: {text}" for i, text in enumerate(texts, 1))


def form(word: str, count: int) -> str:
    """The required form of an answer.

    >>> form("answer", 3)
    'Answer format: answer1/answer2/answer3'
    """
    return "Answer format: " + "/".join(f"{word}{i}" for i in range(1, count + 1))


def _boolq(row: Row) -> Question:
    head = "Please answer the following question with true or false, question: "
    return f"{head}{row['question']}?\n\nAnswer format: true/false", "true" if row["answer"] else "false"


def _answers(question: str, texts: Sequence[str], right: int) -> Question:
    head = "Please choose the correct answer to the question: "
    instruction = f"{head}{question}\n\n{options('Answer', texts)}\n\n{form('answer', len(texts))}"
    return instruction, f"answer{right}"


def _multiple_choice(field: str) -> Callable[[Row], Question]:
    def convert(row: Row) -> Question:
        choices = row["choices"]
        right = list(choices["label"]).index(row["answerKey"]) + 1
        return _answers(row[field], choices["text"], right)

    return convert


def _siqa(row: Row) -> Question:
    texts = [row["answerA"], row["answerB"], row["answerC"]]
    return _answers(f"{row['context']} {row['question']}", texts, int(row["label"]))


def _piqa(row: Row) -> Question:
    head = "Please choose the correct solution to the question: "
    texts = options("Solution", [row["sol1"], row["sol2"]], "\n\n")
    return f"{head}{row['goal']}\n\n{texts}\n\n{form('solution', 2)}", f"solution{int(row['label']) + 1}"


def _hellaswag(row: Row) -> Question:
    head = "Please choose the correct ending to complete the given sentence: "
    question = f"{head}{row['activity_label']}: {row['ctx']}"
    instruction = f"{question}\n\n{options('Ending', row['endings'])}\n\n{form('ending', 4)}"
    return instruction, f"ending{int(row['label']) + 1}"


def _winogrande(row: Row) -> Question:
    head = "Please choose the correct answer to fill in the blank to complete the given sentence: "
    texts = options("Option", [row["option1"], row["option2"]])
    return f"{head}{row['sentence']}\n\n{texts} {form('option', 2)}", f"option{int(row['answer'])}"


def _aqua(row: Row) -> Question:
    # Unchanged: where an option begins with a space, LLM-Adapters' rows have two.
    pairs = (option.partition(")") for option in row["options"])
    texts = " ".join(f"({letter}) {text}" for letter, _, text in pairs)
    return f"{row['question']} Answer Choices: {texts}", row["correct"]


def _gsm8k(row: Row) -> Question:
    return row["question"], _number(row["answer"].rpartition("####")[2])


def _svamp(row: Row) -> Question:
    return f"{row['Body'].rstrip(' .')}. {row['Question']}", _number(row["Answer"])


def _number(value: Any) -> str:
    """Write a number as LLM-Adapters does: ``18.0``."""
    return str(float(str(value).replace(",", "")))


@dataclass(frozen=True)
class HubSource:
    """The test rows of a task on the Hub, and their conversion to questions.

    Attributes:
      config: configuration of the data set; "" where it has only one.
    """

    name: str
    config: str
    split: str
    convert: Callable[[Row], Question]


SOURCES = {
    "boolq": HubSource("google/boolq", "", "validation", _boolq),
    "piqa": HubSource("baber/piqa", "", "validation", _piqa),
    "social_i_qa": HubSource("lighteval/siqa", "", "validation", _siqa),
    "hellaswag": HubSource("Rowan/hellaswag", "", "validation", _hellaswag),
    "winogrande": HubSource("allenai/winogrande", "winogrande_xl", "validation", _winogrande),
    "ARC-Easy": HubSource("allenai/ai2_arc", "ARC-Easy", "test", _multiple_choice("question")),
    "ARC-Challenge": HubSource("allenai/ai2_arc", "ARC-Challenge", "test", _multiple_choice("question")),
    "openbookqa": HubSource("allenai/openbookqa", "main", "test", _multiple_choice("question_stem")),
    "AQuA": HubSource("deepmind/aqua_rat", "raw", "test", _aqua),
    "gsm8k": HubSource("openai/gsm8k", "main", "test", _gsm8k),
    "SVAMP": HubSource("ChilleD/SVAMP", "", "train+test", _svamp),
}
"""The sources by task. MAWPS, AddSub, MultiArith and SingleEq have files in LLM-Adapters only."""


def hub_records(task: Task) -> list[Record]:
    """Read the test rows of a task from the Hub, in the form of LLM-Adapters' test file.

    Raises:
      UserError: the Hub does not have them, a network or the package ``datasets`` is missing, or a row has
        other fields.
    """
    instead = f"give --data FILE, which is {task.file} of the LLM-Adapters repository"
    source = SOURCES.get(task.name)
    if source is None:
        raise UserError(f"task {task.name!r} has no rows on the Hub: {instead}")
    try:
        rows = hub_rows(source.name, source.config, source.split)
    except UserError as error:
        raise UserError(f"task {task.name!r}: {error}; or {instead}") from None
    return [as_record(task, source, row, number) for number, row in enumerate(rows, 1)]


def as_record(task: Task, source: HubSource, row: Row, number: int) -> Record:
    """Convert one row of the Hub to a record.

    Raises:
      UserError: a field is missing or holds an impossible value for this data set.
    """
    try:
        instruction, answer = source.convert(row)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{source.name} (row {number}): not a row of task {task.name!r}: {reason}") from None
    return Record(instruction, "", OUTPUT.format(answer), answer)
