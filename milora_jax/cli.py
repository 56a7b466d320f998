"""What the command lines share: flags into a Config, progress bars, plain log lines."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import inspect
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

from milora_jax.cluster import Cluster
from milora_jax.config import Config
from milora_jax.errors import Preempted, UserError, one_of

LINE_EVERY = 10.0
"""Seconds between two progress lines where the output is not a terminal."""


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one line like all others."""

    def error(self, message: str) -> NoReturn:
        """End the command."""
        raise UserError(f"command line: {message} (--help lists what there is)")


def list_commands(commands: Mapping[str, str]) -> None:
    """Print what each command does, by its name."""
    width = max(map(len, commands))
    for name, what in commands.items():
        print(f"  {name:<{width}}  {what}")
    print("\neach has --help")


def chosen_command(program: str, arguments: Sequence[str], commands: Mapping[str, str]) -> str:
    """The command that the first argument names; asked for help, or for nothing, list them and end.

    Args:
      program: what is typed before the command.
      commands: by their names, what each does.

    Raises:
      UserError: there is no such command.
      SystemExit: they have been listed.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {program} COMMAND ...\n")
        list_commands(commands)
        raise SystemExit(0)
    one_of("the command", arguments[0], tuple(commands))
    return arguments[0]


def meanings_of(cls: type) -> dict[str, str]:
    """The ``Attributes:`` of a dataclass of settings and of those that it extends, by name."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        if each.__doc__ and dataclasses.is_dataclass(each):
            found.update(_attributes(inspect.cleandoc(each.__doc__)))
    return found


def _attributes(text: str) -> Iterator[tuple[str, str]]:
    entries: list[str] = []
    for line in text.partition("Attributes:\n")[2].splitlines():
        if line.startswith("    ") and entries:
            entries[-1] += " " + line.strip()
        elif line.startswith("  "):
            entries.append(line.strip())
        elif line.strip():
            break
    for entry in entries:
        names, _, meaning = entry.partition(": ")
        yield from ((name.strip(), meaning) for name in names.split(","))


SHOWN_AFTER = 2.0
"""Seconds after which it is shown how far a base has been read."""

MEGABYTE = 10**6


class TrainFlags(NamedTuple):
    """The command line of ``train.py``."""

    config: Config
    workdir: Path
    cluster: Cluster


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
        print(sys.modules["__main__"].__doc__)
        raise SystemExit(0)
    path, words = _config_path(argv)
    if not path.is_file():
        raise UserError(f"--config {str(path)!r}: no such file, expected for example configs/tiny.py")
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "Config file.", flag_values=values)
    flags.DEFINE_string("workdir", "", "Folder of the run.", flag_values=values)
    flags.DEFINE_string("coordinator", "", "HOST:PORT of the first process.", flag_values=values)
    flags.DEFINE_integer("processes", 0, "How many processes.", flag_values=values)
    flags.DEFINE_integer("process", -1, "Which of them this is.", flag_values=values)
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


def _reason(error: Exception) -> str:
    """One line of what absl and ml_collections say of a flag."""
    inner = error.args[0] if error.args else error
    unknown = next((each for each in (error, inner) if isinstance(each, KeyError) and each.args), None)
    if unknown is not None:  # 'name', and perhaps a second line: Did you mean ...?
        name, *hint = str(unknown.args[0]).splitlines()
        return f"no setting is called {name}" + "".join(f" ({each})" for each in hint)
    lines = str(error).splitlines()
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


STOPPING = b"\nstopping as soon as nothing is lost; Ctrl-C again stops at once\n"


@contextmanager
def stop_noted() -> Iterator[Callable[[], bool]]:
    """Note SIGTERM and a first Ctrl-C instead of dying of them; a second Ctrl-C interrupts.

    Yields:
      A function that tells whether one of them came.
    """
    came = False

    def note(signum: int, frame: object) -> None:
        nonlocal came
        came = True
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, old[signal.SIGINT])
            with suppress(OSError, ValueError):  # where standard error is no file
                os.write(sys.stderr.fileno(), STOPPING)  # a print may be under way

    old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    if old[signal.SIGINT] is not signal.default_int_handler:  # a job in the background ignores it
        del old[signal.SIGINT]
    for number in old:
        signal.signal(number, note)
    try:
        yield lambda: came
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does: what is half-written is taken away again."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    caught = (signal.SIGTERM, signal.SIGHUP)
    old = [signal.signal(each, interrupt) for each in caught]
    try:
        yield
    finally:
        for each, handler in zip(caught, old, strict=True):
            signal.signal(each, handler)


def stop_if(preempted: Callable[[], bool], doing: str) -> None:
    """End a command at a place where nothing is lost, if it was asked to stop.

    Raises:
      Preempted: naming what was being done.
    """
    if preempted():
        raise Preempted(f"stopped while {doing}: nothing is lost, run the same command again to continue")


class Bar:
    """Progress of one long job, with the time that is left: a tqdm bar on a terminal, plain lines elsewhere.

    Time is counted from the first report on: what comes before it is compilation, or an earlier life of the
    job, and says nothing of its speed.
    """

    def __init__(self, name: str, total: int, unit: str, stream: IO[str] | io.TextIOBase) -> None:
        self._name, self._total, self._unit, self._stream = name, total, unit, stream
        self._reached, self._printed, self._status = 0, time.monotonic(), ""
        self._begun: tuple[int, float] | None = None
        self._bar: Any = None
        if stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=name, unit=unit, file=stream)

    def advance(self, count: int) -> None:
        """Note that ``count`` more units are done."""
        self.reach(self._reached + count, "")

    def reach(self, done: int, status: str) -> None:
        """Note that ``done`` units are done, with a status worth showing (or none)."""
        step, self._reached = done - self._reached, done
        self._status = status or self._status
        if self._begun is None:
            self._begin(done)
        elif self._bar is not None:
            self._bar.update(step)
        if self._bar is not None:
            if status:
                self._bar.set_postfix_str(status)
        elif done == self._total or time.monotonic() - self._printed >= LINE_EVERY:
            self._printed = time.monotonic()
            said = ", ".join(filter(None, (self._status, self._left())))
            tail = f": {said}" if said else ""
            print(f"{self._name} {done}/{self._total} {self._unit}{tail}", file=self._stream, flush=True)

    def _begin(self, done: int) -> None:
        self._begun = done, time.monotonic()
        if self._bar is not None:
            self._bar.initial = self._bar.n = self._bar.last_print_n = done
            self._bar.unpause()
            self._bar.refresh()

    def _left(self) -> str:
        """The time left at the speed so far; nothing where there is no speed yet, or nothing left."""
        if self._begun is None or not self._begun[0] < self._reached < self._total:
            return ""
        done, since = self._begun
        seconds = (time.monotonic() - since) / (self._reached - done) * (self._total - self._reached)
        return f"{datetime.timedelta(seconds=round(seconds))} left"

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


class _Nowhere(io.TextIOBase):
    """A stream that keeps nothing."""

    def write(self, text: str, /) -> int:
        """Take the text."""
        return len(text)


def named_directory(option: str, text: str) -> tuple[str, Path]:
    """The parts of ``NAME=DIR``.

    Raises:
      UserError: it is none.
    """
    name, _, path = text.partition("=")
    if not name or not path:
        raise UserError(f"{option} {text!r}: expected NAME=DIR")
    return name, Path(path)


class Console:
    """Where a command talks to its user: standard error, so that standard output stays data."""

    def __init__(self, silent: bool = False) -> None:
        """Begin to talk.

        Args:
          silent: say nothing, for all processes but the first.
        """
        self._stream = _Nowhere() if silent else sys.stderr

    def say(self, line: str) -> None:
        """Print one line."""
        print(line, file=self._stream, flush=True)

    @contextmanager
    def progress(self, name: str, total: int, unit: str) -> Iterator[Bar]:
        """A bar for the duration of a ``with`` block."""
        bar = Bar(name, total, unit, self._stream)
        try:
            yield bar
        finally:
            bar.close()

    @contextmanager
    def loading(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Show how much of something has been read, if reading takes longer than :data:`SHOWN_AFTER`.

        Yields:
          A function that is told the bytes that are read, and of how many.
        """
        begin: float | None = None
        bar: Bar | None = None

        def progress(done: int, total: int) -> None:
            nonlocal begin, bar
            begin = begin or time.monotonic()  # what is done before anything is read is not reading
            if bar is None and time.monotonic() - begin >= SHOWN_AFTER:
                bar = Bar(name, total // MEGABYTE, "MB", self._stream)
            if bar is not None:
                bar.reach(done // MEGABYTE, "")

        try:
            yield progress
        finally:
            if bar is not None:
                bar.close()
