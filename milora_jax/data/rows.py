"""Rows of a JSON file, a JSONL file or a data set of the Hub, each with its location.

An object may not hold a name twice: a JSON parser would keep the last value, and nobody knows which was
meant.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from milora_jax.base.json_files import unique_names
from milora_jax.errors import UserError

_BETWEEN = re.compile(r"[\s,]*")


def rows_of(location: str) -> Iterator[tuple[Any, str]]:
    """Read the rows of a file or of ``hf:NAME[:CONFIG[:SPLIT]]``, and the location of each.

    Raises:
      UserError: there is nothing to read, or a row is not JSON or holds a name twice; the error names the
        line.
    """
    if location.startswith("hf:"):
        return _hub_rows(location)
    path = Path(location)
    require_rows(path)
    return _jsonl_rows(path) if path.suffix == ".jsonl" else _json_rows(path)


def require_rows(path: Path) -> None:
    """Refuse a path that is no JSON or JSONL file by its name.

    Raises:
      UserError: it is missing or a directory, or has another suffix.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: {'a directory' if path.is_dir() else 'no such file'}, expected JSON or JSONL"
        )
    if path.suffix not in (".json", ".jsonl"):
        raise UserError(f"{path}: suffix {path.suffix!r}: expected .json or .jsonl")


def parse_row(text: str, where: str) -> Any:
    """Parse the JSON value of one line.

    Args:
      where: file and line, for errors.

    Raises:
      UserError: the line is not JSON, or an object in it holds a name twice.
    """
    try:
        return json.loads(text, object_pairs_hook=unique_names)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # duplicate names, endless integers, hostile nesting
        raise UserError(f"{where}: not JSON that can be read ({error})") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror})") from None


def _jsonl_rows(path: Path) -> Iterator[tuple[Any, str]]:
    """One row after the other, so that a file of any size needs the memory of its longest line."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    raise UserError(f"{where}: not UTF-8 text") from None
                if text.strip():
                    yield parse_row(text.rstrip("\n"), where), where
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror})") from None


def _json_rows(path: Path) -> Iterator[tuple[Any, str]]:
    """The rows of a list, which is read whole."""
    text = _read_text(path)
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON that can be read ({error})") from None
    if not isinstance(whole, list):
        raise UserError(f"{path}: expected a JSON list of records")
    yield from _elements(text, path)


def _elements(text: str, path: Path) -> Iterator[tuple[Any, str]]:
    """The elements of a valid JSON list, each with the line on which it begins."""
    decoder, at = json.JSONDecoder(object_pairs_hook=unique_names), text.index("[") + 1
    line, counted, number = 1, 0, 0
    while True:
        between = _BETWEEN.match(text, at)
        at = between.end() if between else at
        if text[at] == "]":
            return
        line, counted, number = line + text.count("\n", counted, at), at, number + 1
        where = f"{path}:{line} (row {number})"
        try:
            row, at = decoder.raw_decode(text, at)
        except ValueError as error:
            raise UserError(f"{where}: not JSON that can be read ({error})") from None
        yield row, where


def file_digest(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
      UserError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror})") from None


def hub_fingerprint(location: str) -> str:
    """The fingerprint that ``datasets`` gives to the rows of ``hf:NAME[:CONFIG[:SPLIT]]``, which follows the
    revision on the Hub.

    Raises:
      UserError: as :func:`rows_of`.
    """
    return str(hub_rows(*_hub_parts(location))._fingerprint)


def _hub_rows(location: str) -> Iterator[tuple[Any, str]]:
    for number, row in enumerate(hub_rows(*_hub_parts(location)), 1):
        yield row, f"{location} (row {number})"


def _hub_parts(location: str) -> tuple[str, str, str]:
    """Name, configuration and split.

    Raises:
      UserError: there is no name, or there are more parts.
    """
    parts = location.split(":")[1:]
    if not parts[0] or len(parts) > 3:
        raise UserError(f"data source {location!r}: expected hf:NAME[:CONFIG[:SPLIT]]")
    name, config, split = (*parts, "", "")[:3]
    return name, config, split or "train"


def hub_rows(name: str, config: str, split: str) -> Any:
    """Read the rows of a Hub data set unchanged.

    Args:
      config: the configuration; "" where the data set has only one.

    Raises:
      UserError: the package ``datasets``, the network or the data set is missing.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"data set {name!r} needs the package datasets: pip install datasets") from None
    # It retries for half a minute and logs each attempt; one line is enough.
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return load_dataset(name, config or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"data set {name!r} cannot be loaded from the Hub: {reason}") from None
    finally:
        logger.setLevel(level)
