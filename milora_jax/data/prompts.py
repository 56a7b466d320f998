"""A record's prompt in either template, the same for training and for inference.

``chat`` is the tokenizer's own template (``data.chat``), in which an instruction is a user's message.

``alpaca`` is the template below, in Stanford Alpaca's words. LLM-Adapters has the same words, but an indented
string puts 16 spaces before every line of them, with other spaces in training than in evaluation; that is not
repeated here. The template ends with a line break after ``### Response:``, so that the answer starts on a
line of its own and no tokenizer merges its first word with the colon.
"""

from __future__ import annotations

from typing import Any

from milora_jax.data.chat import Message, render_chat
from milora_jax.data.records import Record, user_text
from milora_jax.errors import UserError
from milora_jax.prompt_format import PromptFormat

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
    """The prompt of a record in the ``alpaca`` template, up to where the answer begins.

    Raises:
      UserError: the record is a turn of a chat, which the template cannot express.

    >>> print(prompt_text(Record("Say hi.", "", "hi", "hi")).splitlines()[-1])
    ### Response:
    """
    if record.messages:
        raise UserError(
            "a row is a chat, or holds a system message, a history or tools, and data.template is 'alpaca': "
            "expected data.template=chat"
        )
    if record.input:
        return WITH_INPUT.format(instruction=record.instruction, input=record.input)
    return WITHOUT_INPUT.format(instruction=record.instruction)


def prompt_messages(record: Record) -> tuple[Message, ...]:
    """The prompt of a record as a chat: its own messages, or its instruction and input as one user message.

    >>> prompt_messages(Record("Add.", "1 2", "3", "3"))[0].content
    'Add.\\n\\n1 2'
    """
    if record.messages:
        return record.messages
    return (Message("user", user_text(record.instruction, record.input)),)


def shown_prompt(tokenizer: Any, record: Record, prompt_format: PromptFormat) -> str:
    """The prompt of a record as text for people.

    Raises:
      UserError: the record cannot be written in the format's template.
    """
    if prompt_format.template == "chat":
        return render_chat(tokenizer, prompt_messages(record), time=prompt_format.time, tools=record.tools)
    return prompt_text(record)
