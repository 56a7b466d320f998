"""From records to token ids. No answer is ever cut: a record that does not fit is dropped and counted.

A record has one prompt and one answer, and with ``adapter.route_on=prompt`` it makes one example. Otherwise
the turns of a chat have one route, so that they make one example together. A plain text makes as many
examples as it has pieces of ``max_length`` tokens.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from milora_jax.data.chat import encode_exchange
from milora_jax.data.prompts import prompt_messages, prompt_text
from milora_jax.data.records import Record, by_row
from milora_jax.data.scopes import (
    EncodedPrompt,
    encode_messages,
    require_history,
    route_tokens,
    whole_prompt,
)
from milora_jax.errors import UserError
from milora_jax.model_config import ModelConfig
from milora_jax.prompt_format import PromptFormat


@dataclass(frozen=True)
class Example:
    """An encoded record, or the encoded turns of a conversation.

    Attributes:
      tokens: int32 ids of prompt, response and end-of-sequence token.
      prompt_length: how many of them come before the first answer that is learned.
      source: name of the data set that it comes from.
      route_tokens: how many of them, from the first, the routers read; 0 is ``prompt_length``.
      answers: where each answer that is learned begins and ends; empty where there is one, up to the end.
      label: whether the answer is desirable; false for a rejected one.
    """

    tokens: np.ndarray
    prompt_length: int
    source: str = ""
    route_tokens: int = 0
    answers: tuple[tuple[int, int], ...] = ()
    label: bool = True

    @property
    def routed(self) -> int:
        """How many tokens, from the first, the routers read."""
        return self.route_tokens or self.prompt_length

    @property
    def learned(self) -> tuple[tuple[int, int], ...]:
        """Where each answer that is learned begins and ends."""
        return self.answers or ((self.prompt_length, len(self.tokens)),)


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


def encode_question(tokenizer: Any, record: Record, prompt_format: PromptFormat) -> EncodedPrompt:
    """A record's prompt: what training, scoring and generation give to the model.

    Raises:
      UserError: the record cannot be written in the format's template; the error names its row.
    """
    with naming(record):
        if prompt_format.template == "chat":
            return encode_messages(tokenizer, prompt_messages(record), prompt_format, record.tools)
        ids = encode_prompt(tokenizer, prompt_text(record), prompt_format.special_tokens)
        return whole_prompt(ids, prompt_format)


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
    return encode_conversation(tokenizer, [record], eos_ids, max_length, prompt_format)[0]


def encode_conversation(
    tokenizer: Any,
    records: Sequence[Record],
    eos_ids: Sequence[int],
    max_length: int,
    prompt_format: PromptFormat,
) -> tuple[Example | None, int]:
    """The turns of one chat as one example: the first prompt, and all that comes up to the last answer.

    Each turn has the tokens that :func:`encode_example` gives it. The first turn that ends behind
    ``max_length`` tokens and those that follow it are left out, as they would be by themselves.

    Args:
      records: of one chat, in their order; what each goes on from holds the answers of those before.

    Returns:
      The example, None where no turn fits, and how many turns it has.

    Raises:
      RouteScopeError: the chat template writes a turn otherwise once it is history.
      UserError: as :func:`encode_example`.
    """
    turns: list[tuple[Record, EncodedPrompt, list[int]]] = []
    for record in records:
        prompt, response = _exchange(tokenizer, record, eos_ids, prompt_format)
        if len(prompt.ids) + len(response) > max_length:
            break
        turns.append((record, prompt, response))
    if not turns:
        return None, 0
    record, prompt, response = turns[-1]
    tokens = [*prompt.ids, *response]
    for earlier, before, answer in turns[:-1]:
        with naming(earlier):
            require_history(tokens, [*before.ids, *answer], len(prompt_messages(earlier)) + 1)
    answers = tuple((len(before.ids), len(before.ids) + len(answer)) for _, before, answer in turns)
    example = Example(
        tokens=np.array(tokens, np.int32),
        prompt_length=answers[0][0],
        source=record.source,
        route_tokens=prompt.route_tokens,
        answers=answers if len(answers) > 1 else (),
    )
    return example, len(turns)


def _exchange(
    tokenizer: Any, record: Record, eos_ids: Sequence[int], prompt_format: PromptFormat
) -> tuple[EncodedPrompt, list[int]]:
    """A record's prompt, and the ids of its answer."""
    if prompt_format.template != "chat":
        prompt = encode_question(tokenizer, record, prompt_format)
        return prompt, [*encode_prompt(tokenizer, record.output, "none"), eos_ids[0]]
    messages, tools, time = prompt_messages(record), record.tools, prompt_format.time
    with naming(record):
        ids, response = encode_exchange(tokenizer, messages, record.turn, eos_ids, time=time, tools=tools)
        return EncodedPrompt(ids, route_tokens(tokenizer, messages, ids, prompt_format, tools)), response


def encode_text(
    tokenizer: Any,
    record: Record,
    eos_ids: Sequence[int],
    max_length: int,
    prompt_format: PromptFormat,
    prompt_tokens: int,
) -> tuple[list[Example], int]:
    """Cut a plain text and the first of ``eos_ids`` into examples, one after the other.

    Each begins with the beginning-of-sequence token if the text does, so that what reads a prompt finds the
    beginning of every prompt alike, and has at most ``max_length`` tokens.

    Args:
      record: of a plain text.
      prompt_tokens: how many tokens, from the first of each example, are its prompt, and not learned. The
        first token is never learned.

    Returns:
      The examples with a token to learn, and the number of those without one.

    Raises:
      RouteScopeError: the routers read a part that a text does not have.
    """
    with naming(record):
        ids = whole_prompt(
            encode_prompt(tokenizer, record.output, prompt_format.special_tokens), prompt_format
        ).ids
    bos = tokenizer.bos_token_id
    start = ids[:1] if bos is not None and ids[:1] == [bos] else []
    body = ids[len(start) :]
    body = body if body and body[-1] in eos_ids else [*body, eos_ids[0]]
    room, prompt = max_length - len(start), max(prompt_tokens, 1)
    pieces = [[*start, *body[at : at + room]] for at in range(0, len(body), room)]
    examples = [
        Example(np.array(piece, np.int32), prompt, record.source) for piece in pieces if len(piece) > prompt
    ]
    return examples, len(pieces) - len(examples)


class LeftOut(NamedTuple):
    """What is not learned.

    Attributes:
      long: records that do not fit.
      short: pieces of plain texts that are no longer than their prompt.
    """

    long: int
    short: int


def encode_records(
    tokenizer: Any,
    records: Sequence[Record],
    model: ModelConfig,
    max_length: int,
    prompt_format: PromptFormat,
    what: str = "",
) -> tuple[list[Example], int]:
    """Encode records as :func:`encode_into` does, all at once.

    Returns:
      The examples that fit, in order, and the number of records that do not.
    """
    kept: list[Example] = []
    left = encode_into(kept.append, tokenizer, records, model, max_length, prompt_format, what)
    return kept, left.long


def encode_into(
    keep: Callable[[Example], Any],
    tokenizer: Any,
    records: Iterable[Record],
    model: ModelConfig,
    max_length: int,
    prompt_format: PromptFormat,
    what: str = "",
    prompt_tokens: int = 0,
) -> LeftOut:
    """Encode records one after the other, as :func:`encode_example` does each, or
    :func:`encode_conversation` the turns of a chat that have one route, or :func:`encode_text` a plain text.

    Args:
      keep: receives the examples that fit, in order.
      model: the model whose embeddings the tokens must have, and whose tokens end an answer.
      what: name of the records in errors: "dev" or "training".
      prompt_tokens: see :func:`encode_text`.

    Returns:
      What is left out.

    Raises:
      UserError: no record fits, one cannot be written in the format's template, or one has a token without an
        embedding.
    """
    kept = dropped = short = 0
    inputs = (model.eos_ids, max_length, prompt_format)
    for turns in in_examples(records, prompt_format):
        if turns[0].is_text:
            examples, left = encode_text(tokenizer, turns[0], *inputs, prompt_tokens)
            short += left
        else:
            example, fitting = encode_conversation(tokenizer, turns, *inputs)
            dropped += len(turns) - fitting
            examples = [] if example is None else [example]
        for example in examples:
            with naming(turns[0]):
                require_embedded(tokenizer, example.tokens, model.vocab_size)
            keep(example)
            kept += 1
    kind = f"{what} rows" if what else "rows"
    if not kept and short:
        raise UserError(
            f"all {kind} are texts of at most data.prompt_tokens {prompt_tokens} tokens, or too long"
        )
    if not kept:
        raise UserError(f"all {dropped} {kind} are longer than data.max_length {max_length} tokens")
    return LeftOut(dropped, short)


def in_examples(records: Iterable[Record], prompt_format: PromptFormat) -> Iterator[list[Record]]:
    """The records that make an example together: the turns of one row where they have one route."""
    if prompt_format.route_on == "prompt" or prompt_format.template != "chat":
        yield from ([record] for record in records)
        return
    for row in by_row(records):
        yield from (list(turns) for _, turns in itertools.groupby(row, lambda each: each.where))


def token_fingerprint(examples: Iterable[Example]) -> str:
    """SHA-256 over the token ids of examples in order, which are what a model gets of the rows."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example_bytes(example))
    return digest.hexdigest()


def example_bytes(example: Example) -> bytes:
    """The content of an example, as :func:`token_fingerprint` reads it."""
    head = f"{example.prompt_length} {len(example.tokens)}\0"
    if example.route_tokens or example.answers:
        head += f"{example.route_tokens} {example.answers}\0"
    if not example.label:
        head += "rejected\0"
    return head.encode() + example.tokens.astype("<i4").tobytes()


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
