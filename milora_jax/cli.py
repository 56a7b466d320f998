"""What the command lines share: how they parse, what they say while they work, how they are stopped."""

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
from typing import IO, Any, NoReturn

from milora_jax.errors import Preempted, UserError, one_of

LINE_EVERY = 10.0
"""Seconds between two progress lines where the output is not a terminal."""


class _Help(argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and after the help of an option its default, if there is one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        given = default is not None and default is not False and default not in ("", [], argparse.SUPPRESS)
        if not action.option_strings or not given or "default" in text:
            return text
        shown = ",".join(map(str, default)) if isinstance(default, list) else str(default)
        return f"{text} (default: {shown.replace('%', '%%')})"


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one line like all others, and whose help names the defaults."""

    def __init__(self, **settings: Any) -> None:
        """Begin without options; ``settings`` are those of argparse."""
        super().__init__(**{"formatter_class": _Help, **settings})

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


STOPPING = {
    signal.SIGTERM: b"\nstopping as soon as nothing is lost\n",
    signal.SIGINT: b"\nstopping as soon as nothing is lost; Ctrl-C again stops at once\n",
}


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
            os.write(sys.stderr.fileno(), STOPPING[signal.Signals(signum)])  # a print may be under way

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
