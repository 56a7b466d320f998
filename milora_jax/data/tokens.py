"""The conversion of records to token ids. Nothing is truncated: a row that does not fit is dropped and
counted."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from milora_jax.data.chat import encode_chat, encode_exchange
from milora_jax.data.prompts import prompt_messages, prompt_text
from milora_jax.data.records import Record
from milora_jax.errors import UserError
from milora_jax.model_config import ModelConfig
from milora_jax.prompt_format import PromptFormat


@dataclass(frozen=True)
class Example:
    """An encoded record.

    Attributes:
      tokens: int32 ids of prompt, response and end-of-sequence token.
      prompt_length: number of tokens of the prompt.
      source: name of the data set that the record comes from.
    """

    tokens: np.ndarray
    prompt_length: int
    source: str = ""


def load_tokenizer(path: str) -> Any:
    """Load the tokenizer of a Hugging Face directory; no code in the directory is run.

    Raises:
      UserError: files are missing or broken.
    """
    # Without torch, transformers warns that it found none, which does not matter here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    if not Path(path).is_dir():
        raise UserError(f"model.path {path!r}: no such directory, expected a Hugging Face model")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: no usable tokenizer ({reason})") from None


def encode_prompt(
    tokenizer: Any, text: str, special_tokens: str = "tokenizer", *, parse_special_tokens: bool = False
) -> list[int]:
    """Encode a prompt that is a text.

    Args:
      special_tokens: special tokens around the text, see ``prompt_format.PromptFormat``. ``tokenizer`` gives
        the ids of ``tokenizer(text)``.
      parse_special_tokens: read special tokens that are written in the text, as in a chat that the caller has
        rendered. A beginning-of-sequence token at the beginning of the text is not added again. Otherwise
        ``</s>`` in a text is four characters, and ends nothing.

    >>> from milora_jax.tiny import MODEL_DIR
    >>> tokenizer = load_tokenizer(str(MODEL_DIR))
    >>> encode_prompt(tokenizer, "the", "bos")[0] == tokenizer.bos_token_id
    True
    """
    ids = tokenizer.encode(
        text, add_special_tokens=special_tokens == "tokenizer", split_special_tokens=not parse_special_tokens
    )
    bos = tokenizer.bos_token_id
    if special_tokens == "bos" and bos is not None:
        ids = [bos, *ids]
    doubled = parse_special_tokens and bos is not None and ids[:2] == [bos, bos]
    return ids[1:] if doubled and text.startswith(tokenizer.bos_token) else ids


def encode_question(tokenizer: Any, record: Record, prompt_format: PromptFormat) -> list[int]:
    """Encode a record's prompt as training, scoring and generation do.

    Raises:
      UserError: the record cannot be written in the format's template; the error names its row.
    """
    with naming(record):
        if prompt_format.template == "chat":
            return encode_chat(tokenizer, prompt_messages(record), time=prompt_format.time)
        return encode_prompt(tokenizer, prompt_text(record), prompt_format.special_tokens)


def encode_example(
    tokenizer: Any, record: Record, eos_ids: Sequence[int], max_length: int, prompt_format: PromptFormat
) -> Example | None:
    """Encode a record; None if it is longer than ``max_length`` tokens.

    The tokens of the prompt, and so its route, are the same in training and in inference.

    Args:
      eos_ids: tokens that end an answer, at least one. ``alpaca`` uses the first, ``chat`` the one with which
        the template ends turns.

    Raises:
      UserError: the record cannot be written in the format's template; the error names its row.
    """
    if prompt_format.template == "chat":
        messages, time = prompt_messages(record), prompt_format.time
        with naming(record):
            prompt, response = encode_exchange(tokenizer, messages, record.output, eos_ids, time=time)
    else:
        prompt = encode_question(tokenizer, record, prompt_format)
        response = [*encode_prompt(tokenizer, record.output, "none"), eos_ids[0]]
    tokens = np.array([*prompt, *response], np.int32)
    return Example(tokens, len(prompt), record.source) if len(tokens) <= max_length else None


def encode_records(
    tokenizer: Any,
    records: Sequence[Record],
    model: ModelConfig,
    max_length: int,
    prompt_format: PromptFormat,
    what: str = "",
) -> tuple[list[Example], int]:
    """Encode records by :func:`encode_example`.

    Args:
      model: the model whose embeddings the tokens must have, and whose tokens end an answer.
      what: name of the records in errors: "dev" or "training".

    Returns:
      The examples that fit, in order, and the number of the others.

    Raises:
      UserError: no record fits, one cannot be written in the format's template, or one has a token without an
        embedding.
    """
    kept, dropped = [], 0
    for record in records:
        example = encode_example(tokenizer, record, model.eos_ids, max_length, prompt_format)
        if example is None:
            dropped += 1
            continue
        with naming(record):
            require_embedded(tokenizer, example.tokens, model.vocab_size)
        kept.append(example)
    if not kept:
        kind = f"{what} rows" if what else "rows"
        raise UserError(f"all {len(records)} {kind} are longer than data.max_length {max_length} tokens")
    return kept, dropped


def token_fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 over the token ids of examples in order, which are what a model gets of the rows."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.prompt_length} {len(example.tokens)}\0".encode())
        digest.update(example.tokens.astype("<i4").tobytes())
    return digest.hexdigest()


def require_embedded(tokenizer: Any, ids: Sequence[int] | np.ndarray, vocab_size: int) -> None:
    """Refuse tokens without an embedding, for which an accelerator would silently read another one.

    Args:
      vocab_size: V, the number of rows of the model's embedding.

    Raises:
      UserError: there is such an id; the error names the first.
    """
    found = np.asarray(ids)
    beyond = found[(found < 0) | (found >= vocab_size)]
    if beyond.size:
        first = int(beyond[0])
        text = tokenizer.convert_ids_to_tokens(first) if 0 <= first < 2**31 else None
        named = f"token {first}" if text is None else f"token {first} ({text!r})"
        raise UserError(f"{named}: expected 0 to {vocab_size - 1}")


@contextmanager
def naming(record: Record) -> Iterator[None]:
    """Prefix errors with the row of a record."""
    try:
        yield
    except UserError as error:
        if record.where:
            error.args = (f"{record.where}: {error}",)  # keeps the class of the error
        raise
