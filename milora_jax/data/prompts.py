"""The one prompt template, used for training and for inference.

The wording is Stanford Alpaca's. The LLM-Adapters project uses the same words but, through an indented
string, puts 16 spaces before every line and spaces them differently in training and in evaluation; we
do not repeat that. The template ends with a line break after ``### Response:``, so that the answer
starts on a line of its own and no tokenizer merges its first word with the colon.
"""

from __future__ import annotations

from milora_jax.data.records import Record

WITHOUT_INPUT = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Response:
"""

WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:
"""


def prompt_text(record: Record) -> str:
    """The prompt of a record, up to where the answer begins.

    >>> print(prompt_text(Record("Say hi.", "", "hi", "hi")).splitlines()[-1])
    ### Response:
    """
    if record.input:
        return WITH_INPUT.format(instruction=record.instruction, input=record.input)
    return WITHOUT_INPUT.format(instruction=record.instruction)
