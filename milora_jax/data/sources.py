"""The sources of a run's rows: files and data sets of the Hub, with the names of the tasks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from milora_jax.columns import Column, columns_of, parse_columns, require_sources
from milora_jax.config import DataSection, parse_weights
from milora_jax.errors import UserError, require

SPLIT_STEMS = ("train", "dev", "test", "validation", "valid")


@dataclass(frozen=True)
class Source:
    """A source of records: a file, or ``hf:NAME[:CONFIG[:SPLIT]]``; and the task's name.

    Attributes:
      columns: names of its columns, see ``columns``; empty where they are those of a schema.
      train_on: the answers of a chat that are learned, one of ``config.TRAIN_ON``.
    """

    name: str
    location: str
    columns: tuple[Column, ...] = ()
    train_on: str = "all"


def parse_sources(text: str, columns: str = "") -> list[Source]:
    """Split comma-separated ``[NAME=]SOURCE``.

    The default name is the file's stem, or its folder's name where the stem only names the split; for the Hub
    it is the last part of the data set's name.

    Args:
      columns: a ``data.columns``, which may have entries for other sources as well.

    >>> [source.name for source in parse_sources("data/gsm8k/test.jsonl,mine=rows.json")]
    ['gsm8k', 'mine']
    """
    sources, parsed = [], parse_columns(columns)
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, separator, location = entry.partition("=")
        if not separator or "/" in name:  # a path such as data/run=3/train.jsonl holds no name
            name, location = _default_name(entry), entry
        if not name or not location:
            raise UserError(f"data source {entry!r}: expected [NAME=]SOURCE")
        if name in {source.name for source in sources}:
            raise UserError(f"data source {entry!r}: the name {name!r} is used twice, write NAME=SOURCE")
        sources.append(Source(name, location, columns_of(parsed, name)))
    return sources


def parse_given(data: str, columns: str) -> list[Source]:
    """Parse the sources of a command's ``--data`` and ``--columns``; none where neither is given.

    Raises:
      UserError: an entry is malformed, or columns are given without sources or for an unknown source.
    """
    sources = parse_sources(data, columns)
    if data and not sources:
        raise UserError(f"--data {data!r} names no file")
    if columns and not sources:
        raise UserError(f"--columns {columns!r} is about the rows of --data: expected --data FILE")
    require_sources(parse_columns(columns), [source.name for source in sources])
    return sources


def run_sources(data: DataSection) -> dict[str, list[Source]]:
    """The sources of a run, by ``train``, ``dev`` and ``test``.

    Raises:
      UserError: a source is malformed, or ``data.columns`` or ``data.weights`` names an unknown source, or a
        training source has no weight.
    """
    splits = {
        split: parse_sources(text, data.columns)
        for split, text in (("train", data.train), ("dev", data.dev), ("test", data.test))
    }
    for split in ("train", "dev"):
        splits[split] = [replace(source, train_on=data.train_on) for source in splits[split]]
    weights, trained = parse_weights(data.weights), [source.name for source in splits["train"]]
    for name in weights:
        expected = f"names of data.train, {', '.join(trained)}, not {name!r}"
        require(name in trained, "data.weights", data.weights, expected)
    for name in trained if weights else ():
        require(name in weights, "data.weights", data.weights, f"a weight for {name!r} of data.train too")
    names = [source.name for sources in splits.values() for source in sources]
    require_sources(parse_columns(data.columns), names)
    return splits


def _default_name(location: str) -> str:
    if location.startswith("hf:"):
        return location.split(":")[1].split("/")[-1]
    path = Path(location)
    return path.parent.name or path.stem if path.stem in SPLIT_STEMS else path.stem
