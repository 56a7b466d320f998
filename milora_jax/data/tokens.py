"""From records to token ids. Nothing is ever cut: a row that does not fit is dropped and counted."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from milora_jax.data.chat import encode_chat, encode_exchange
from milora_jax.data.prompts import prompt_messages, prompt_text
from milora_jax.data.records import Record
from milora_jax.errors import UserError


@dataclass(frozen=True)
class Example:
    """An encoded record.

    Attributes:
      tokens: int32 ids of prompt, response and end-of-sequence token.
      prompt_length: how many of them are the prompt.
    """

    tokens: np.ndarray
    prompt_length: int


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a Hugging Face directory; no code from the directory is run.

    Raises:
      UserError: where the files are missing or broken.
    """
    # transformers tells everybody without torch that it found none; nothing here wants it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    if not Path(path).is_dir():
        raise UserError(f"model.path {path!r}: no such directory, expected a Hugging Face model")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: no usable tokenizer ({reason})") from None


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Ids of a prompt, with one beginning-of-sequence token where the tokenizer has one."""
    ids = _encode_text(tokenizer, text)
    bos = tokenizer.bos_token_id
    return ids if bos is None else [bos, *ids]


def _encode_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of plain text: ``</s>`` in a record is five characters, and ends nothing."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def encode_question(tokenizer: Any, record: Record, template: str) -> list[int]:
    """Ids of a record's prompt: what training, scoring and generation give to the model.

    Args:
      template: one of ``config.TEMPLATES``.

    Raises:
      UserError: the record cannot be written in this template.
    """
    if template == "chat":
        return encode_chat(tokenizer, prompt_messages(record))
    return encode_prompt(tokenizer, prompt_text(record))


def encode_example(
    tokenizer: Any, record: Record, eos_ids: Sequence[int], max_length: int, template: str = "alpaca"
) -> Example | None:
    """An encoded record, or None where it is longer than ``max_length`` tokens.

    The prompt's tokens, and so its route, are the same in training and in inference.

    Args:
      eos_ids: tokens that end an answer, at least one. ``alpaca`` takes the first, ``chat`` the one that the
        template ends turns with.
      template: one of ``config.TEMPLATES``.

    Raises:
      UserError: the record cannot be written in this template.
    """
    if template == "chat":
        prompt, response = encode_exchange(tokenizer, prompt_messages(record), record.output, eos_ids)
    else:
        prompt = encode_question(tokenizer, record, template)
        response = [*_encode_text(tokenizer, record.output), eos_ids[0]]
    tokens = np.array([*prompt, *response], np.int32)
    return Example(tokens, len(prompt)) if len(tokens) <= max_length else None


def encode_records(
    tokenizer: Any,
    records: Sequence[Record],
    eos_ids: Sequence[int],
    max_length: int,
    template: str = "alpaca",
) -> tuple[list[Example], int]:
    """Encode records, as :func:`encode_example` does each.

    Returns:
      The examples that fit, in order, and how many did not.

    Raises:
      UserError: where none fits, or one cannot be written in this template.
    """
    encoded = [encode_example(tokenizer, record, eos_ids, max_length, template) for record in records]
    kept = [example for example in encoded if example is not None]
    if not kept:
        raise UserError(f"all {len(records)} rows are longer than data.max_length {max_length} tokens")
    return kept, len(encoded) - len(kept)
