"""Inputs of the files in ``configs/recipes/``: chats, a base with a chat template, and plain texts.

They are made from the embedded tasks and written when such a file is loaded, by every process alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from milora_jax.storage.files import write_atomic
from milora_jax.tiny import MODEL_DIR, TASKS_DIR

SYSTEM = "Answer with more or less."
QUESTION = "Is there more or less at the end?"

TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'system' %}{{ message.content + '\\n' }}
{%- elif message.role == 'user' %}{{ '\\nQuestion: ' + message.content }}
{%- else %}{{ '\\nAnswer: ' + message.content + eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '\\nAnswer:' }}{% endif %}"""
"""A chat template in words that the embedded model has seen."""

INPUTS = Path("runs/inputs")
"""Where the recipes write, from the directory in which a run is started."""

TURNS = 3
"""Questions in a chat."""

SENTENCES = 6
"""Sums in a text."""


def sums(split: str) -> list[dict[str, str]]:
    """The rows of the embedded task on sums."""
    lines = (TASKS_DIR / "arithmetic" / f"{split}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def make_labels(split: str) -> list[dict[str, str]]:
    """Stories without their question, and whether there is more or less at the end, a label word."""
    rows = []
    for row in sums(split):
        story = row["instruction"].rpartition("How many")[0].strip()
        label = "more" if "+" in row["output"] else "less"
        rows.append({"instruction": QUESTION, "input": story, "output": label, "answer": label})
    return rows


def grouped(rows: Iterable[Mapping[str, str]], size: int) -> Iterator[list[Mapping[str, str]]]:
    """Rows in groups of a size; what is left over is left out."""
    rest = iter(rows)
    while len(group := list(islice(rest, size))) == size:
        yield group


def make_chats(split: str) -> list[dict[str, Any]]:
    """Chats of several such stories, in OpenAI's form."""
    return [
        {
            "messages": [
                {"role": "system", "content": SYSTEM},
                *(
                    {"role": role, "content": row[field]}
                    for row in group
                    for role, field in (("user", "input"), ("assistant", "answer"))
                ),
            ]
        }
        for group in grouped(make_labels(split), TURNS)
    ]


def make_texts(split: str) -> list[dict[str, str]]:
    """Texts of several sums and their solutions."""
    return [
        {"text": "\n".join(f"{row['instruction']} {row['output']}" for row in group)}
        for group in grouped(sums(split), SENTENCES)
    ]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """Write rows as JSONL, and give the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return str(path)


def write_chat_model(directory: Path) -> str:
    """Copy the embedded model, with :data:`TEMPLATE`, and give the path."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in MODEL_DIR.iterdir():
        if not (directory / path.name).exists():
            write_atomic(directory / path.name, path.read_bytes())
    write_atomic(directory / "chat_template.jinja", TEMPLATE.encode())
    return str(directory)
