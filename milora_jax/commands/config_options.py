"""``--config FILE[:WORDS] --config.group.field=value``: a file of settings, and replacements for some of
them.

The options are argparse's, made from the dataclasses of ``Config``. ml_collections, whose ConfigDict the
files return, has flags for this, but they need absl: a second parser beside argparse, whose errors name
Python's types instead of what is expected.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from milora_jax.commands.command_line import Parser, with_default
from milora_jax.commands.options import help_texts
from milora_jax.config import AdapterSection, Config, value_type
from milora_jax.config_file import call_config_file
from milora_jax.errors import UserError

TRUTHS = {**dict.fromkeys(("true", "t", "1"), True), **dict.fromkeys(("false", "f", "0"), False)}

READERS: dict[Any, Callable[[str], Any]] = {
    bool: lambda text: TRUTHS[text.lower()],
    int: lambda text: int(text, 0 if text[:2].lower() in ("0x", "0o") else 10),
}
"""Readers of values of types that do not read texts themselves."""

EXPECTED = {int: "a whole number", float: "a number", bool: "true or false"}

DROPPED = {
    "flagfile": "write its options into the command line, or its settings into the file of --config",
    "undefok": "leave out the options that it names",
}
"""Options of absl, which read ``train.py``'s command line before, and what to do without each."""


def todays_spelling(arguments: Sequence[str]) -> list[str]:
    """Replace absl's spellings of options, ``-workdir`` and ``--noconfig.data.pack``, with a note for each.

    Raises:
      UserError: an option of absl that is gone is given.
    """
    spelt = []
    for given in arguments:
        name = given.partition("=")[0]
        if name.startswith("-") and name.lstrip("-") in DROPPED:
            instead = DROPPED[name.lstrip("-")]
            raise UserError(f"command line: {name} is an option of absl that is gone: {instead}")
        today = re.sub(r"^-(?=[a-z]\w)", "--", given)
        today = re.sub(r"^--noconfig\.([^=]+)$", r"--config.\1=false", today)
        if today != given:
            print(f"note: {given} is deprecated, from the next release on write {today}", file=sys.stderr)
        spelt.append(today)
    return spelt


def read_config_file(given: str, overrides: Sequence[str] = ()) -> Config:
    """Read the settings of a file, and replace those that options give.

    Args:
      given: the path, and after a colon words that are passed to its ``get_config``.
      overrides: such as ``--config.train.seed=1``.

    Raises:
      UserError: the file is missing or raises an error, or a setting is unknown or of another type.
    """
    path, colon, words = given.partition(":")
    passed = [words] if colon else []
    found = call_config_file(Path(path), "get_config", *passed, example="configs/tiny.py")
    if not hasattr(found, "to_dict"):
        kind = type(found).__name__
        raise UserError(
            f"--config {path!r}: get_config() gives a {kind}, expected to_config_dict(Config(...))"
        )
    values = found.to_dict()
    asked, unknown = settings_parser().parse_known_args(todays_spelling(overrides))
    if unknown:
        raise UserError(f"command line: {_reason(unknown[0])}")
    for name, text in vars(asked).items():
        _, section, field = name.split(".")
        values.setdefault(section, {})[field] = _converted(section, field, text)
    return Config.from_dict(values)


def settings_parser() -> Parser:
    """Make a parser of every setting as ``--config.group.field``, whose values are texts."""
    parser = Parser(usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    for section, cls in typing.get_type_hints(Config).items():
        note = "where none is given, the method's own" if cls is AdapterSection else None
        group, texts = parser.add_argument_group(f"settings of {section}", note), help_texts(cls)
        for field in dataclasses.fields(cls):
            about: dict[str, Any] = {"help": with_default(texts.get(field.name, ""), field.default)}
            if _kind(section, field.name) is bool:
                about |= {"nargs": "?", "const": "true"}  # --config.data.pack alone is true
            name = f"--config.{section}.{field.name}"
            group.add_argument(name, metavar="VALUE", default=argparse.SUPPRESS, **about)
    return parser


def _kind(section: str, field: str) -> Any:
    return value_type(typing.get_type_hints(typing.get_type_hints(Config)[section])[field])


def _converted(section: str, field: str, text: str) -> Any:
    kind = _kind(section, field)
    try:
        return READERS[kind](text) if kind in READERS else kind(text)
    except (KeyError, ValueError):
        expected = EXPECTED[kind]
        raise UserError(
            f"command line: flag --config.{section}.{field}={text}: expected {expected}"
        ) from None


def _reason(argument: str) -> str:
    """The fault of an argument that is not a setting."""
    name = argument.partition("=")[0]
    if not name.startswith("--"):
        return f"unexpected argument {argument!r}, settings are --config.group.field=value"
    hints = typing.get_type_hints(Config)
    if not name.startswith("--config."):
        return f"unknown option {name} (--help lists what there is)"
    section, _, field = name.removeprefix("--config.").partition(".")
    known = [each.name for each in dataclasses.fields(hints[section])] if section in hints else list(hints)
    wrong = field if section in hints and field else section
    near = difflib.get_close_matches(wrong, known, n=1)
    hint = f' (Did you mean "{near[0]}" instead of "{wrong}"?)' if near else ""
    return f"no setting is called {wrong!r}{hint}"
