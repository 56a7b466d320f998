"""``--config FILE[:WORDS] --config.group.field=value``: a file of settings, and settings given in its place.

ml_collections has flags for this. They are absl's: a second parser beside argparse, whose errors name types
of Python and not what is expected. So the options are argparse's here, made from the dataclasses of
``Config``, and of ml_collections the ConfigDict is left, which the files return.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
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
"""What reads a value of a type, where the type itself does not."""

EXPECTED = {int: "a whole number", float: "a number", bool: "true or false"}


def read_config_file(given: str, overrides: Sequence[str] = ()) -> Config:
    """The settings of a file, and others in their place.

    Args:
      given: the path, and after a colon words that are handed to its ``get_config``.
      overrides: such as ``--config.train.seed=1``.

    Raises:
      UserError: the file is missing or raises an error, or a setting is unknown or of another type.
    """
    path, colon, words = given.partition(":")
    handed = [words] if colon else []
    found = call_config_file(Path(path), "get_config", *handed, example="configs/tiny.py")
    if not hasattr(found, "to_dict"):
        kind = type(found).__name__
        raise UserError(
            f"--config {path!r}: get_config() gives a {kind}, expected to_config_dict(Config(...))"
        )
    values = found.to_dict()
    # --noconfig.data.pack is absl's spelling of --config.data.pack=false.
    spelt = [re.sub(r"^--noconfig\.(.+)", r"--config.\1=false", each) for each in overrides]
    asked, unknown = settings_parser().parse_known_args(spelt)
    if unknown:
        raise UserError(f"command line: {_reason(unknown[0])}")
    for name, text in vars(asked).items():
        _, section, field = name.split(".")
        values.setdefault(section, {})[field] = _converted(section, field, text)
    return Config.from_dict(values)


def settings_parser() -> Parser:
    """A parser of every setting as ``--config.group.field``, whose values are texts; its help lists all."""
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
    """What is wrong with an argument that is no setting."""
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
