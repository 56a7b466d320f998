"""What the pages of the site say of settings and command lines, made from the program itself.

    python docs/generated.py             # the tables of docs/configuration.md made anew
    python docs/generated.py commands    # every command line with its --help

MkDocs calls :func:`on_page_markdown` for every page (``hooks`` in ``mkdocs.yml``).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import subprocess
import sys
import typing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "configuration.md"

COMMANDS = (
    ("-m", "milora_jax"),
    ("-m", "milora_jax", "doctor"),
    ("train.py",),
    ("serve.py",),
    ("-m", "milora_jax.evaluation"),
    ("-m", "milora_jax.evaluation", "study"),
    ("-m", "milora_jax.evaluation", "routing"),
    ("-m", "milora_jax.evaluation", "mt-bench", "answer"),
    ("-m", "milora_jax.evaluation", "mt-bench", "judge"),
    ("-m", "milora_jax.generation"),
    ("-m", "milora_jax.storage"),
    ("-m", "milora_jax.storage", "export"),
    ("-m", "milora_jax.storage", "import"),
    ("-m", "milora_jax.storage", "verify"),
    ("-m", "milora_jax.storage", "push"),
    ("-m", "milora_jax.parallel", "aot"),
    ("-m", "milora_jax.bench", "decode"),
    ("-m", "milora_jax.bench", "train"),
    ("-m", "milora_jax.bench", "rows"),
    ("-m", "milora_jax.bench", "prefill"),
    ("-m", "milora_jax.bench", "lookup"),
    ("-m", "milora_jax.bench", "load"),
    ("-m", "milora_jax.bench", "serve"),
    ("-m", "milora_jax.bench", "overhead"),
    ("-m", "milora_jax.bench", "startup"),
    ("-m", "milora_jax.bench", "device"),
    ("-m", "milora_jax.bench", "files"),
    ("-m", "milora_jax.serving"),
    ("-m", "milora_jax.tiny"),
)
"""Every command line, as arguments of ``python``."""

FORMER_NORMALIZE = "former name of `adapter.features`: true is rms, false is raw."
"""The one setting of ``AdapterSection`` that no method has: it is read for older configs."""

WRONG: dict[type, Any] = {int: -2, float: -1.0, str: "?"}
"""A value that a check refuses, where a setting has one."""


class Described(typing.NamedTuple):
    """One setting of one class.

    Attributes:
      name: of the field.
      kind: its type, as a reader writes it.
      default: as it stands in Python.
      allowed: what its check expects; empty where there is none.
      meaning: from the docstring; empty where nobody has written it.
    """

    name: str
    kind: str
    default: str
    allowed: str
    meaning: str


def described(cls: Any) -> list[Described]:
    """Every field of a dataclass of settings, in its order."""
    from milora_jax.commands.options import attribute_docs

    hints, meanings = typing.get_type_hints(cls), attribute_docs(cls)
    rows = []
    for field in dataclasses.fields(cls):
        kind = getattr(hints[field.name], "__name__", str(hints[field.name]))
        allowed = "true or false" if kind == "bool" else allowed_by(cls, field.name, hints[field.name])
        rows.append(Described(field.name, kind, repr(field.default), allowed, meanings.get(field.name, "")))
    return rows


def allowed_by(cls: Any, name: str, kind: type) -> str:
    """What the check of a setting says that it expects, asked with a value that it refuses."""
    from milora_jax.errors import UserError

    if kind not in WRONG:
        return ""
    try:
        cls(**{name: WRONG[kind]})
    except UserError as error:
        return str(error).partition(": expected ")[2]
    return ""


def settings_markdown() -> str:
    """A table for each section of ``Config``, and one for the methods."""
    from milora_jax.config import AdapterSection, Config

    parts = []
    for section in dataclasses.fields(Config):
        cls: Any = typing.get_type_hints(Config)[section.name]
        parts += [f"## {section.name}", inspect.cleandoc(cls.__doc__).splitlines()[0]]
        if cls is AdapterSection:
            parts.append(_table(("setting", "of methods (default)", "allowed", "meaning"), method_rows()))
            continue
        rows = [
            (f"`{section.name}.{row.name}`", row.kind, f"`{row.default}`", row.allowed, row.meaning)
            for row in described(cls)
        ]
        parts.append(_table(("setting", "type", "default", "allowed", "meaning"), rows))
    return "\n\n".join(parts)


def method_rows() -> list[tuple[str, ...]]:
    """A row for every meaning of every setting of the methods, with the methods that give it this one."""
    from milora_jax.adapters.registry import METHOD_CLASSES, METHODS
    from milora_jax.config import AdapterSection

    rows: list[tuple[str, ...]] = [
        ("`adapter.method`", "(`'milora'`)", f"one of {', '.join(METHODS)}", "the fine-tuning method")
    ]
    every = {method: {row.name: row for row in described(cls)} for method, cls in METHOD_CLASSES.items()}
    for field in dataclasses.fields(AdapterSection):
        users: dict[tuple[str, str], dict[str, list[str]]] = {}
        for method, known in every.items():
            if (row := known.get(field.name)) is not None:
                by_default = users.setdefault((row.allowed, row.meaning), {})
                by_default.setdefault(row.default, []).append(method)
        for (allowed, meaning), by_default in users.items():
            named = "; ".join(f"{', '.join(names)} (`{value}`)" for value, names in by_default.items())
            rows.append((f"`adapter.{field.name}`", named, allowed, meaning))
    rows.append(("`adapter.normalize`", "milora, midora", "true or false", FORMER_NORMALIZE))
    return rows


def limits_markdown() -> str:
    """A table of what bounds a server, as the flags of ``serve.py``."""
    from milora_jax.serving.limits import Limits

    rows = [
        (f"`--{row.name.replace('_', '-')}`", f"`{row.default}`", row.allowed, row.meaning)
        for row in described(Limits)
    ]
    return _table(("flag", "default", "allowed", "meaning"), rows)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def shown(command: tuple[str, ...]) -> str:
    """A command as one types it."""
    return " ".join(("python", *command))


@functools.cache
def help_text(command: tuple[str, ...]) -> str:
    """What a command prints for ``--help``."""
    environment = {**os.environ, "COLUMNS": "92", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, *command, "--help"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode or not done.stdout.strip():
        raise RuntimeError(f"{shown(command)} --help: exit code {done.returncode}\n{done.stderr}")
    return done.stdout.strip()


def commands_markdown() -> str:
    """Every command line with its ``--help``."""
    with ThreadPoolExecutor(2) as pool:
        texts = pool.map(help_text, COMMANDS)
        return "\n\n".join(
            f"## {shown(command).removeprefix('python ').removeprefix('-m ')}\n\n"
            f"```text\n$ {shown(command)} --help\n{text}\n```"
            for command, text in zip(COMMANDS, texts, strict=True)
        )


WRITTEN = {"settings": settings_markdown, "limits": limits_markdown}
"""Tables that stand in ``docs/configuration.md``, for who reads it in a checkout; a test keeps them true."""

COMMANDS_MARKER = "<!-- commands -->"
"""What takes its place when the site is built: the text depends on the version of Python."""


def with_tables(markdown: str) -> str:
    """The page of settings with its tables made anew.

    Raises:
      ValueError: a table has no place between ``<!-- NAME -->`` and ``<!-- end of NAME -->``.
    """
    for name, make in WRITTEN.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        head, _, rest = markdown.partition(begin)
        _, found, tail = rest.partition(end)
        if not found:
            raise ValueError(f"no {begin} ... {end}")
        markdown = f"{head}{begin}\n\n{make()}\n\n{end}{tail}"
    return markdown


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """MkDocs' hook: the page of commands with their ``--help``."""
    del page, config, files
    return markdown.replace(COMMANDS_MARKER, commands_markdown()) if COMMANDS_MARKER in markdown else markdown


def main(what: str) -> None:
    """Print the commands, or write the tables of settings."""
    if what == "commands":
        print(commands_markdown())
        return
    PAGE.write_text(with_tables(PAGE.read_text()))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "settings")
