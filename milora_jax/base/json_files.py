"""Read JSON files that may be malformed or hostile."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from milora_jax.errors import UserError


def parse_json_object(content: bytes, where: str) -> dict[str, Any]:
    """Parse the JSON object in ``content``, in which no name may occur twice.

    Args:
      where: the name of the content in errors.

    Raises:
      UserError: the content is not such an object.
    """
    try:
        value = json.loads(content, object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, hostile nesting, endless digits
        raise UserError(f"{where}: not readable JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror})") from None
    return parse_json_object(content, str(path))


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The ``object_pairs_hook`` of a JSON parser that refuses objects with duplicate names.

    Raises:
      ValueError: a name occurs twice; the error names it.
    """
    values = dict(pairs)
    if len(values) != len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the name {name[:100]!r} occurs twice")
    return values
