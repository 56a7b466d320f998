"""The rows of a run: read, divided into training and dev rows, encoded, and arranged.

Records and examples pass one after the other, so that nothing here needs them all in memory. What keeps the
examples decides: a list, or with ``data.prepared_path`` files (``training.prepared``).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from milora_jax.adapters.registry import build_method
from milora_jax.config import Config, parse_weights
from milora_jax.data.chat import template_source
from milora_jax.data.dev_rows import first_rows, holdout
from milora_jax.data.mixture import mixture, source_numbers
from milora_jax.data.packing import Rows
from milora_jax.data.preferences import ANSWERS, encode_preferences, reader_of
from milora_jax.data.records import Record, Records, read_records, record_bytes
from milora_jax.data.sources import Source, run_sources
from milora_jax.data.tokens import (
    Example,
    LeftOut,
    encode_example,
    encode_into,
    encode_question,
    encode_text,
    example_bytes,
    naming,
    require_embedded,
)
from milora_jax.errors import require
from milora_jax.model_config import ModelConfig
from milora_jax.training.prepared import prepared_examples

Keep = Callable[[Example], Any]

AT_ONCE = 512
"""Records that are hashed before they are encoded: in turns, hashing and tokenising drive each other out of
the CPU's caches, and a start takes several per cent longer."""


@dataclass(frozen=True)
class RowSources:
    """Where the rows of a config are, or what was read of them.

    Attributes:
      sources: those of training and of dev rows.
      train: records of all training sources together.
      dev: records of each dev source; empty where dev rows are held out.
      tests: records by task name.
      dev_tests: records of the dev sources that are answered at every dev evaluation, by source; empty where
        ``train.best_by`` needs no answers.
    """

    sources: Mapping[str, Sequence[Source]]
    train: Iterable[Record]
    dev: Sequence[Iterable[Record]]
    tests: dict[str, list[Record]]
    dev_tests: dict[str, list[Record]]


@dataclass(frozen=True)
class Facts:
    """What is known of encoded rows beside the rows.

    Attributes:
      held_out: number of dev records that are held-out training records.
      train_dropped, dev_dropped: number of records that are too long.
      data_fingerprint, token_fingerprint: see ``prepare.Run``.
      texts: number of records that are plain texts.
      short: number of pieces of them that are left out, because they are no longer than their prompt.
    """

    held_out: int
    train_dropped: int
    dev_dropped: int
    data_fingerprint: str
    token_fingerprint: str
    texts: int = 0
    short: int = 0


def read_rows(config: Config) -> RowSources:
    """Read the rows of a config; with ``data.prepared_path`` those of training and dev are read later.

    Raises:
      UserError: a row is malformed, and the error names file and line; or ``data.train_on`` is not read.
    """
    train_on, read = config.data.train_on, config.data.train_on == "all" or not config.train.prefers
    require(read, "data.train_on", train_on, f"'all': objective {config.train.objective!r} does not read it")
    sources = run_sources(config.data)
    later, reader = bool(config.data.prepared_path), reader_of(config.train.objective)
    train = Records(tuple(sources["train"]), reader)
    dev = [Records((source,), reader) for source in sources["dev"]]
    kept = train if later else list(train)
    tests = {source.name: read_records(source, scored=True) for source in sources.pop("test")}
    dev_tests = _dev_tests(config, sources["dev"])
    return RowSources(sources, kept, dev if later else [list(each) for each in dev], tests, dev_tests)


def _dev_tests(config: Config, sources: Sequence[Source]) -> dict[str, list[Record]]:
    """The dev records that are answered at every dev evaluation, by source."""
    by = config.train.best_by
    if by == "loss":
        return {}
    require(bool(sources), "data.dev", config.data.dev, f"files: train.best_by {by!r} scores their rows")
    if by != "accuracy":
        metric = config.eval.metric
        require(bool(metric), "eval.metric", metric, f"FILE.py:FUNCTION: train.best_by is {by!r}")
    found = {}
    for source in sources:
        records = list(first_rows(read_records(source, scored=True), config.data.dev_limit))
        answered = by != "accuracy" or all(record.answered for record in records)
        expected = f"'loss' or a metric, the rows of dev source {source.name!r} have no answers to compare"
        require(answered, "train.best_by", by, expected)
        found[source.name] = records[: config.eval.limit or None]
    return found


def encode_rows(
    rows: RowSources, tokenizer: Any, config: Config, model: ModelConfig, log: Callable[[str], None]
) -> dict[str, Any]:
    """The fields of a ``prepare.Run`` that hold rows.

    Raises:
      UserError: a row cannot be encoded, or no training or dev row is short enough.
    """
    data, tests = config.data, rows.tests
    if data.prepared_path:

        def make(keep: Mapping[str, Keep]) -> dict[str, Any]:
            return asdict(_encode(rows, tokenizer, config, model, keep))

        examples, about = prepared_examples(rows.sources, tokenizer, config, model, make, log)
        facts = Facts(**about)
    else:
        lists: dict[str, list[Example]] = {"train": [], "dev": []}
        facts = _encode(rows, tokenizer, config, model, {name: each.append for name, each in lists.items()})
        examples = lists
    require_prompts(facts.texts, config)
    if facts.short:
        log(f"texts: {facts.short} pieces of at most {max(data.prompt_tokens, 1)} tokens are left out")
    if not rows.dev:
        log(f"no dev file: {facts.held_out} of the training rows are held out")
    train, dev = examples["train"], examples["dev"]
    answers = ANSWERS if config.train.prefers else 1
    counted = len(train) // answers, len(dev) // answers
    log(
        f"rows: {counted[0]} train ({facts.train_dropped} longer than {data.max_length} tokens dropped), "
        f"{counted[1]} dev ({facts.dev_dropped} dropped), {sum(map(len, tests.values()))} test"
        + (f" (at most {config.eval.limit} of a task are scored)" if tests and config.eval.limit else "")
    )
    for asked in (rows.dev_tests, tests):
        _require_room(asked, tokenizer, config, model)
    capacity = answers * data.max_length if data.pack else None
    mixed = _mixed(train, answers, config, log)
    arranged = {"train": Rows(train, capacity, answers, mixed), "dev": Rows(dev, capacity, answers)}
    if data.pack:
        log(f"packed: {len(arranged['train'])} train rows, {len(arranged['dev'])} dev rows")
    return {
        **arranged,
        "tests": tests,
        "dev_tests": rows.dev_tests,
        "data_fingerprint": facts.data_fingerprint,
        "token_fingerprint": facts.token_fingerprint,
    }


def require_prompts(texts: int, config: Config) -> None:
    """Refuse plain texts without a prompt for a method that reads one, and a prompt where there is no text.

    Args:
      texts: number of training and dev rows that are plain texts.
    """
    method, tokens = build_method(config.adapter), config.data.prompt_tokens
    fits = not texts or tokens > 0 or not method.reads_prompt
    expected = f"at least 1: rows are plain texts, and method {method.name!r} reads the prompt of each"
    require(fits, "data.prompt_tokens", tokens, expected)
    require(texts > 0 or not tokens, "data.prompt_tokens", tokens, "0: no row is a plain text")


def _mixed(
    examples: Sequence[Example], answers: int, config: Config, log: Callable[[str], None]
) -> np.ndarray | None:
    """The prompts of an epoch by ``data.weights``; None where every one stands in it once."""
    weights = parse_weights(config.data.weights)
    if not weights:
        return None
    sources = source_numbers(examples, list(weights))[::answers]
    chosen = mixture(sources, weights, config.train.seed)
    rows, shown = np.bincount(sources), np.bincount(sources[chosen])
    parts = (
        f"{name} {count / len(chosen):.1%} ({count} of {own} rows)"
        for name, count, own in zip(weights, shown, rows, strict=True)
    )
    log(f"an epoch has {len(chosen)} examples: {', '.join(parts)}")
    return chosen


def _encode(
    rows: RowSources, tokenizer: Any, config: Config, model: ModelConfig, keep: Mapping[str, Keep]
) -> Facts:
    """Divide and encode the records: all training examples go to ``keep["train"]``, then the others."""
    data, written = config.data, config.prompt_format

    def fits(record: Record) -> bool:
        if config.train.prefers:
            return True  # one that is too long is refused
        if record.is_text:
            inputs = (model.eos_ids, data.max_length, written, data.prompt_tokens)
            return bool(encode_text(tokenizer, record, *inputs)[0])
        return encode_example(tokenizer, record, model.eos_ids, data.max_length, written) is not None

    if rows.dev:
        train: Iterable[Record] = rows.train
        dev: Iterable[Record] = itertools.chain.from_iterable(
            first_rows(each, data.dev_limit, fits) for each in rows.dev
        )
    else:
        train, dev = holdout(rows.train, data.dev_share, config.train.seed, data.dev_limit, fits)
    of_records = hashlib.sha256((template_source(tokenizer) if data.template == "chat" else "").encode())
    of_tokens = hashlib.sha256()
    counts, left = {}, {}
    texts = 0

    def seen(records: Iterable[Record], name: str) -> Iterator[Record]:
        nonlocal texts
        counts[name], rest = 0, iter(records)
        while some := list(itertools.islice(rest, AT_ONCE)):
            for record in some:
                of_records.update(record_bytes(record))
            counts[name] += len(some)
            texts += sum(record.is_text for record in some)
            if texts:
                require_prompts(texts, config)  # before minutes of encoding
            yield from some

    for name, records, what in (("train", train, "training"), ("dev", dev, "dev")):

        def kept(example: Example, into: Keep = keep[name]) -> None:
            of_tokens.update(example_bytes(example))
            into(example)

        passing, inputs = seen(records, name), (model, data.max_length, written)
        if config.train.prefers:
            left[name] = LeftOut(0, 0)
            encode_preferences(kept, tokenizer, passing, *inputs)
        else:
            left[name] = encode_into(kept, tokenizer, passing, *inputs, what, data.prompt_tokens)
    return Facts(
        held_out=0 if rows.dev else counts["dev"],
        train_dropped=left["train"].long,
        dev_dropped=left["dev"].long,
        data_fingerprint=of_records.hexdigest(),
        token_fingerprint=of_tokens.hexdigest(),
        texts=texts,
        short=left["train"].short + left["dev"].short,
    )


def _require_room(tests: dict[str, list[Record]], tokenizer: Any, config: Config, model: ModelConfig) -> None:
    """Refuse a prompt that leaves no room for its answer, or that has a token without an embedding, hours
    before it would be scored."""
    room = model.max_positions - config.eval.max_new_tokens
    for task, records in tests.items():
        for number, record in enumerate(records[: config.eval.limit or None], 1):
            ids = encode_question(tokenizer, record, config.prompt_format).ids
            require(
                len(ids) <= room,
                f"prompt length of row {number} of {task!r}, which is scored",
                len(ids),
                f"at most {room} tokens, {model.max_positions} positions less eval.max_new_tokens "
                f"{config.eval.max_new_tokens}",
            )
            with naming(record):
                require_embedded(tokenizer, ids, model.vocab_size)
