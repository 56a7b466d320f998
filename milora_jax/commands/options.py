"""Options of a command line made from a dataclass of settings, with help from its ``Attributes:``."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import typing
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

from milora_jax.cluster import Cluster
from milora_jax.commands.command_line import Parser

Settings = TypeVar("Settings")

CLUSTER_OPTIONS = tuple(field.name for field in dataclasses.fields(Cluster))


def attribute_docs(cls: type) -> dict[str, str]:
    """The ``Attributes:`` of a dataclass and its bases by name; empty under ``python -OO``."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        if each.__doc__ and dataclasses.is_dataclass(each):
            found.update(_attributes(inspect.cleandoc(each.__doc__)))
    return found


def _attributes(docstring: str) -> Iterator[tuple[str, str]]:
    entries: list[str] = []
    for line in docstring.partition("Attributes:\n")[2].splitlines():
        if line.startswith("    ") and entries:
            entries[-1] += " " + line.strip()
        elif line.startswith("  "):
            entries.append(line.strip())
        elif line.strip():
            break
    for entry in entries:
        names, _, meaning = entry.partition(": ")
        yield from ((name.strip(), meaning) for name in names.split(","))


def help_texts(cls: type) -> dict[str, str]:
    """:func:`attribute_docs` as the help of options: without markup, and with ``%`` escaped for argparse."""
    docs = attribute_docs(cls)
    return {name: text.rstrip(".").replace("``", "").replace("%", "%%") for name, text in docs.items()}


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


_integers.__name__, _names.__name__ = "numbers", "names"  # argparse's errors: invalid numbers value: 'x'

READERS: dict[Any, Callable[[str], Any]] = {
    **{kind: kind for kind in (int, float, str, Path)},
    tuple[int, ...]: _integers,
    tuple[str, ...]: _names,
}
"""Readers of the types of fields; several values are separated by commas."""


def add_options(parser: argparse.ArgumentParser, cls: Any, skip: Collection[str] = ()) -> None:
    """Add an option for every field of a dataclass; one without a default is required.

    The help names the values in a field's ``metadata["choices"]``; the dataclass checks them.
    """
    texts, hints = help_texts(cls), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in skip:
            continue
        choices = field.metadata.get("choices")
        named = f": of {', '.join(choices)}" if choices else ""
        about: dict[str, Any] = {"help": texts.get(field.name, "") + named}
        if hints[field.name] is bool:
            about["action"] = "store_true"
        else:
            about["type"] = READERS[hints[field.name]]
        if field.default is dataclasses.MISSING:
            about["required"] = True
        else:
            about["default"] = field.default
        parser.add_argument(f"--{field.name.replace('_', '-')}", **about)


def add_mesh_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that may be started on every host of a cluster."""
    about = "devices such as fsdp=4,tensor=2 (default: one; on every host of a cluster, the run's mesh)"
    parser.add_argument("--mesh", default="", help=about)
    add_options(parser, Cluster)


def settings_of(cls: type[Settings], asked: argparse.Namespace, **others: Any) -> Settings:
    """Make the dataclass of the options that :func:`add_options` added.

    Args:
      others: values of fields without such an option.
    """
    names = [field.name for field in dataclasses.fields(typing.cast(Any, cls))]
    return cls(**{name: getattr(asked, name) for name in names if name not in others}, **others)


def parse_settings(
    cls: type[Settings], program: str, description: str | None, arguments: list[str]
) -> Settings:
    """Parse a command line whose only options are settings."""
    parser = Parser(prog=program, description=description)
    add_options(parser, cls)
    return settings_of(cls, parser.parse_args(arguments))
