"""Checks of the data: rows are present, fit, and teach something sensible."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from milora_jax.console import Console
from milora_jax.data.batches import collate
from milora_jax.data.preferences import encode_preferences, reader_of
from milora_jax.data.records import Record, read_records
from milora_jax.data.sources import Source, run_sources
from milora_jax.data.tokens import (
    Example,
    encode_conversation,
    encode_question,
    encode_text,
    in_examples,
    naming,
    require_embedded,
)
from milora_jax.doctor.findings import FAIL, OK, WARN, Finding, guarded
from milora_jax.doctor.subject import Subject
from milora_jax.evaluation.free_text import is_free_text, require_text_packages
from milora_jax.evaluation.tasks import require_golds, rule_for
from milora_jax.training.rows import require_prompts

SPLITS = ("train", "dev", "test")

LARGE = 20_000
"""Number of rows from which on the progress of encoding is shown."""

MARKS = ("### Instruction:", "### Response:")
"""Marks of the alpaca template: a field with one of them has been put into a template already."""


def row_findings(subject: Subject) -> Iterator[Finding]:
    """Read every source and report its number of rows; an unreadable source does not hide the others."""
    if not subject.config.data.train:
        yield Finding(FAIL, "data.train", "no training rows: --config.data.train=FILE.jsonl")
    subject.records = {split: {} for split in SPLITS}
    sources = run_sources(subject.config.data)
    learned = functools.partial(read_records, reader=reader_of(subject.config.train.objective))
    readers = {"train": learned, "dev": learned, "test": functools.partial(read_records, scored=True)}
    for split, found in subject.records.items():
        for source in sources[split]:
            yield from guarded(f"data.{split}", functools.partial(_read, source, readers[split], found))
        if split == "test":
            for name, records in found.items():
                yield from guarded("data.test", functools.partial(_golds, name, records))
        if found:
            counts = ", ".join(f"{name} {len(records)}" for name, records in found.items())
            yield Finding(OK, f"data.{split}", f"rows read: {counts}")


def _read(
    source: Source, read: Callable[[Source], list[Record]], found: dict[str, list[Record]]
) -> Iterator[Finding]:
    """Add the rows of a source to ``found``; it yields no finding of its own."""
    found[source.name] = read(source)
    yield from ()


def _golds(name: str, records: list[Record]) -> Iterator[Finding]:
    """Check that the answers are those of the task whose name the rows have, and that free text can be
    measured.
    """
    golds = [record.answer for record in records]
    rule = rule_for(name, golds)
    if unusual := require_golds(name, golds, rule):
        yield Finding(WARN, "data.test", unusual)
    if is_free_text(rule, records):
        require_text_packages()


def token_findings(subject: Subject) -> Iterator[Finding]:
    """Encode every row as training and scoring do, and check the results."""
    config, model = subject.config, subject.model
    learned = (record for split in ("train", "dev") for record in _all_of(subject, split))
    require_prompts(sum(record.is_text for record in learned), config)
    total = sum(len(rows) for split in subject.records.values() for rows in split.values())
    with contextlib.ExitStack() as stack:
        # A progress bar for few rows would only interrupt the report.
        bar = stack.enter_context(Console(total < LARGE).progress("encoding", total, "rows"))
        for split in ("train", "dev"):
            encode = _encoded_pairs if config.train.prefers else _encoded_answers
            encoded = encode(subject, list(_all_of(subject, split)), bar.advance)
            subject.examples[split] = encoded
            if encoded:
                yield length_finding(split, [len(e.tokens) for e in encoded], config.data.max_length)
                yield from example_findings(split, encoded, subject.tokenizer.bos_token_id)
        room = model.max_positions - config.eval.max_new_tokens
        prompts = []
        for record in _all_of(subject, "test"):
            prompts.append(len(encode_question(subject.tokenizer, record, config.prompt_format).ids))
            bar.advance(1)
        if prompts:
            yield prompt_finding(prompts, room)


def _encoded_answers(
    subject: Subject, records: Sequence[Record], advance: Callable[[int], None]
) -> list[Example]:
    """The examples of rows of supervised tuning, however long: it is told which lengths are dropped. Plain
    texts are cut."""
    model, written, encoded, data = subject.model, subject.config.prompt_format, [], subject.config.data
    for turns in in_examples(records, written):
        if turns[0].is_text:
            inputs = (model.eos_ids, data.max_length, written, data.prompt_tokens)
            made = encode_text(subject.tokenizer, turns[0], *inputs)[0]
        else:
            one, _ = encode_conversation(subject.tokenizer, turns, model.eos_ids, sys.maxsize, written)
            made = [] if one is None else [one]
        for example in made:
            with naming(turns[0]):
                require_embedded(subject.tokenizer, example.tokens, model.vocab_size)
        encoded += made
        advance(len(turns))
    return encoded


def _encoded_pairs(
    subject: Subject, records: Sequence[Record], advance: Callable[[int], None]
) -> list[Example]:
    """The examples of preference rows, two of each."""
    encoded: list[Example] = []
    if records:
        inputs = (subject.model, subject.config.data.max_length, subject.config.prompt_format)
        encode_preferences(encoded.append, subject.tokenizer, records, *inputs)
        advance(len(records))
    return encoded


def length_finding(split: str, lengths: Sequence[int], max_length: int) -> Finding:
    """Report the lengths of the rows, and how many of them ``data.max_length`` drops."""
    median, high, most = np.percentile(lengths, (50, 99, 100)).round().astype(int)
    dropped = sum(length > max_length for length in lengths)
    said = f"tokens p50 {median}, p99 {high}, max {most} of data.max_length {max_length}; "
    said += f"{dropped} of {len(lengths)} rows dropped"
    if not dropped:
        return Finding(OK, f"data.{split}", said)
    level = FAIL if dropped == len(lengths) else WARN
    return Finding(level, f"data.{split}", f"{said}: --config.data.max_length={most} keeps all")


def example_findings(split: str, examples: Sequence[Example], bos: int | None) -> Iterator[Finding]:
    """Find rows that teach nothing, or that a model has never seen the like of.

    Args:
      bos: the beginning-of-sequence token; None if there is none.
    """
    length = max(len(example.tokens) for example in examples)
    unasked = unlearned = bare = doubled = 0
    for example in examples:
        batch = collate([[example]], length, 1)
        unasked += not batch.prompt_mask.any()
        # The first token of a row is never predicted.
        unlearned += not batch.loss_mask[:, 1:].any()
        bare += any(end - start == 1 for start, end in example.learned)
        doubled += bos is not None and example.tokens[:2].tolist() == [bos, bos]
    of = f"of {len(examples)} rows"
    name = f"data.{split}"
    if unasked:
        do = "the template or the tokenizer leaves nothing of it, and the router would see nothing"
        yield Finding(FAIL, name, f"{unasked} {of} have a prompt without tokens: {do}")
    if unlearned:
        do = "remove them, or correct the tokenizer"
        yield Finding(FAIL, name, f"{unlearned} {of} have no token to learn (all-zero loss mask): {do}")
    if bare:
        do = "write an answer, or remove them"
        yield Finding(WARN, name, f"{bare} {of} have an answer of the end token alone: {do}")
    if doubled:
        do = "it or the template adds a second one; take that out of tokenizer.json or of the template"
        yield Finding(FAIL, name, f"{doubled} {of} begin with two beginning-of-sequence tokens: {do}")
    if not (unasked or unlearned or bare or doubled):
        yield Finding(OK, name, "every row has a prompt, tokens to learn and at most one beginning")


def prompt_finding(lengths: Sequence[int], room: int) -> Finding:
    """Check that the prompts of the test rows leave room for their answers.

    Args:
      room: the model's positions less ``eval.max_new_tokens``.
    """
    longest = max(lengths)
    said = f"prompts of {min(lengths)} to {longest} tokens"
    if longest <= room and min(lengths) > 0:
        return Finding(OK, "data.test", said)
    if longest <= room:
        return Finding(FAIL, "data.test", f"{said}: expected at least one, correct the template")
    do = "remove the longest rows, or lower --config.eval.max_new_tokens"
    return Finding(FAIL, "data.test", f"{said}: expected at most {room}, to have room for an answer; {do}")


def overlap_findings(subject: Subject) -> Iterator[Finding]:
    """Find dev and test rows that are also trained on, and rows that contain a template's words."""
    trained = {_asked(record) for record in _all_of(subject, "train")}
    clean = True
    for split in ("dev", "test"):
        for name, records in subject.records[split].items():
            twice = sum(_asked(record) in trained for record in records)
            if twice:
                clean = False
                said = f"{name}: {twice} of {len(records)} prompts are in the training rows as well"
                yield Finding(WARN, f"data.{split}", f"{said}: what is measured on them is memory")
    marks = _marks(subject)
    for split in SPLITS:
        records = _all_of(subject, split)
        worded = sum(any(mark in text for text in _texts(record) for mark in marks) for record in records)
        if worded:
            clean = False
            said = f"{worded} of {len(records)} rows hold a template's words or control tokens as text"
            yield Finding(WARN, f"data.{split}", f"{said}: give the fields without a template")
    if clean:
        yield Finding(OK, "overlap", "no prompt of dev or test is in the training rows, no row was templated")


def sample(subject: Subject, count: int) -> list[Example]:
    """Training rows of the run, spread over the data: ``count`` of them, or all."""
    fitting = [e for e in subject.examples["train"] if len(e.tokens) <= subject.config.data.max_length]
    return fitting[:: max(1, len(fitting) // count)][:count]


def _all_of(subject: Subject, split: str) -> list[Record]:
    return [record for records in subject.records[split].values() for record in records]


def _asked(record: Record) -> tuple:
    """The key by which two prompts are compared; a plain text is compared whole."""
    if record.is_text:
        return (record.output.strip(),)
    return record.messages or (record.instruction.strip(), record.input.strip())


def _texts(record: Record) -> tuple[str, ...]:
    return (record.instruction, record.input, record.output)


def _marks(subject: Subject) -> tuple[str, ...]:
    special = [text for text in map(str, subject.tokenizer.all_special_tokens) if len(text) > 2]
    return (*MARKS, *special)
