"""The command line of ``train.py``, and its settings as ``--config.group.field=value`` for other commands."""

from __future__ import annotations

import dataclasses
import sys
import typing
from pathlib import Path
from typing import Any, NamedTuple

from milora_jax.cli import Parser, meanings_of
from milora_jax.cluster import Cluster
from milora_jax.config import AdapterSection, Config
from milora_jax.errors import UserError


class TrainFlags(NamedTuple):
    """The command line of ``train.py``."""

    config: Config
    workdir: Path
    cluster: Cluster


FLAGS = {
    "config": "a file of settings, and after a colon words for it",
    "workdir": "folder of the run (default: runs/ and the name of the config file)",
    "coordinator": "HOST:PORT of the first process, where the environment does not tell it",
    "processes": "how many processes there are, likewise",
    "process": "which of them this is, from 0, likewise",
}
"""What is no setting."""


def parse_train_flags() -> TrainFlags:
    """Read ``--config FILE``, ``--config.group.field=value``, ``--workdir DIR`` and, where the environment
    does not tell, ``--coordinator HOST:PORT --processes N --process I`` from ``sys.argv``.

    ``--config FILE:WORDS`` hands the words to the file's ``get_config``.

    ml_collections looks for overrides in ``sys.argv`` itself, so no other list can be read.

    Raises:
      UserError: for a missing config file, an unknown flag or setting, or a value of another type.
    """
    from absl import flags
    from ml_collections import config_flags

    argv = sys.argv
    if any(argument in ("-h", "--help") for argument in argv[1:]):
        print(help_text())
        raise SystemExit(0)
    path, words = _config_path(argv)
    if not path.is_file():
        raise UserError(f"--config {str(path)!r}: no such file, expected for example configs/tiny.py")
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, FLAGS["config"], flag_values=values)
    flags.DEFINE_string("workdir", "", FLAGS["workdir"], flag_values=values)
    flags.DEFINE_string("coordinator", "", FLAGS["coordinator"], flag_values=values)
    flags.DEFINE_integer("processes", 0, FLAGS["processes"], flag_values=values)
    flags.DEFINE_integer("process", -1, FLAGS["process"], flag_values=values)
    try:
        rest = values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"command line: {_reason(error)}") from None
    except (SyntaxError, ImportError, NameError) as error:
        raise UserError(f"--config {str(path)!r}: {type(error).__name__}: {error}") from None
    if len(rest) > 1:
        raise UserError(
            f"command line: unexpected argument {rest[1]!r}, settings are --config.group.field=value"
        )
    overridden: Any = values["config"].value
    if not hasattr(overridden, "to_dict"):
        kind = type(overridden).__name__
        raise UserError(
            f"--config {str(path)!r}: get_config() gives a {kind}, expected to_config_dict(Config(...))"
        )
    config = Config.from_dict(overridden.to_dict())
    named_after = "-".join([path.stem, *filter(None, words.split(","))])
    workdir = Path(values["workdir"].value or Path("runs") / named_after)
    named: dict[str, Any] = {name: values[name].value for name in ("coordinator", "processes", "process")}
    return TrainFlags(config, workdir, Cluster(**named))


def read_config_file(path: str, overrides: list[str]) -> Config:
    """A config file with the flags of ``train.py``, for other commands.

    Args:
      overrides: such as ``--config.train.seed=1``.

    Raises:
      UserError: as :func:`parse_train_flags`.
    """
    argv = sys.argv
    try:
        # ml_collections reads overrides from there and from nowhere else.
        sys.argv = [argv[0], "--config", path, *overrides]
        return parse_train_flags().config
    finally:
        sys.argv = argv


def help_text() -> str:
    """Every flag and every setting, with what a file that says nothing gives it, and what it means."""
    parser = Parser(
        add_help=False,
        usage="python train.py --config FILE[:WORDS] [--config.GROUP.FIELD=VALUE ...] [--workdir DIR]",
        description=sys.modules["__main__"].__doc__,
    )
    flags = parser.add_argument_group("flags")
    for name, meaning in FLAGS.items():
        flags.add_argument(f"--{name}", metavar="VALUE", help=meaning)
    for section, cls in typing.get_type_hints(Config).items():
        note = "where none is given, the method's own" if cls is AdapterSection else None
        settings, meanings = parser.add_argument_group(f"settings of {section}", note), meanings_of(cls)
        for field in dataclasses.fields(cls):
            meaning = meanings.get(field.name, "").rstrip(".").replace("``", "").replace("%", "%%")
            default = None if field.default is None else str(field.default)
            name = f"--config.{section}.{field.name}"
            settings.add_argument(name, metavar="VALUE", default=default, help=meaning)
    return parser.format_help()


EXPECTED = {
    "invalid literal for int()": "a whole number",
    "could not convert string to float": "a number",
    "Non-boolean argument": "true or false",
}
"""What Python and absl say of a value, and what is meant."""


def _reason(error: Exception) -> str:
    """One line of what absl and ml_collections say of a flag."""
    inner = error.args[0] if error.args else error
    unknown = next((each for each in (error, inner) if isinstance(each, KeyError) and each.args), None)
    if unknown is not None:  # 'name', and perhaps a second line: Did you mean ...?
        name, *hint = str(unknown.args[0]).splitlines()
        return f"no setting is called {name}" + "".join(f" ({each})" for each in hint)
    lines = str(error).splitlines()
    for said, expected in EXPECTED.items():
        flag, found, _ = lines[-1].partition(said)
        if found and len(lines) == 1:  # flag --name=value: ...
            given = flag.rstrip(": ('")
            return f"{given}: expected {expected}"
    # Of what get_config() raised, ml_collections gives the whole traceback: its last line says it.
    return lines[-1] if "Traceback" in str(error) else "; ".join(lines)


def _config_path(argv: list[str]) -> tuple[Path, str]:
    """The config file, and what comes after its colon."""
    found = []
    for i, argument in enumerate(argv):
        if argument in ("--config", "-config") and i + 1 < len(argv):
            found.append(argv[i + 1])
        if argument.startswith(("--config=", "-config=")):
            found.append(argument.split("=", 1)[1])
    if not found:
        raise UserError("--config is missing, expected for example --config configs/tiny.py")
    if len(found) > 1:
        raise UserError(f"--config is given {len(found)} times, expected once")
    path, _, words = found[0].partition(":")
    return Path(path), words
