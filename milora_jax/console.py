"""Log lines and progress of a long job on standard error."""

from __future__ import annotations

import datetime
import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from milora_jax.errors import as_given

LINE_EVERY = 10.0
"""Seconds between two progress lines where the output is not a terminal."""


SHOW_LOADING_AFTER = 2.0
"""Seconds of reading after which progress is shown."""

MEGABYTE = 10**6


class ProgressBar:
    """Progress of one long job, with the time that is left: a tqdm bar on a terminal, plain lines elsewhere.

    The time left is estimated from the first report on: the time before it is compilation or an earlier run
    of the job, which says nothing about the speed.
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
        """Record that ``count`` more units are done."""
        self.reach(self._reached + count, "")

    def reach(self, done: int, status: str) -> None:
        """Record that ``done`` units are done, with a status to show, which may be empty."""
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
            shown = ", ".join(filter(None, (self._status, self._left())))
            tail = f": {shown}" if shown else ""
            print(f"{self._name} {done}/{self._total} {self._unit}{tail}", file=self._stream, flush=True)

    def _begin(self, done: int) -> None:
        self._begun = done, time.monotonic()
        if self._bar is not None:
            self._bar.initial = self._bar.n = self._bar.last_print_n = done
            self._bar.unpause()
            self._bar.refresh()

    def _left(self) -> str:
        """The time left at the speed so far; empty where the speed is unknown or nothing is left."""
        if self._begun is None or not self._begun[0] < self._reached < self._total:
            return ""
        done, since = self._begun
        seconds = (time.monotonic() - since) / (self._reached - done) * (self._total - self._reached)
        return f"{datetime.timedelta(seconds=round(seconds))} left"

    def close(self) -> None:
        """Close the bar and leave it on the screen."""
        if self._bar is not None:
            self._bar.close()


class _Discard(io.TextIOBase):
    """A stream that discards what is written and is no terminal."""

    def write(self, text: str, /) -> int:
        """Drop the text."""
        return len(text)


class Console:
    """Log lines and progress bars on standard error, so that standard output stays data."""

    def __init__(self, silent: bool = False) -> None:
        """Make a console.

        Args:
          silent: print nothing, as all processes but the first do.
        """
        self._stream = _Discard() if silent else sys.stderr

    def log(self, line: str) -> None:
        """Print one line."""
        print(as_given(line), file=self._stream, flush=True)

    @contextmanager
    def progress(self, name: str, total: int, unit: str) -> Iterator[ProgressBar]:
        """A bar for the duration of a ``with`` block."""
        bar = ProgressBar(name, total, unit, self._stream)
        try:
            yield bar
        finally:
            bar.close()

    @contextmanager
    def loading(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Show how much of something has been read, if reading takes longer than :data:`SHOW_LOADING_AFTER`.

        Yields:
          A function that takes the number of bytes read so far and their total.
        """
        begin: float | None = None
        bar: ProgressBar | None = None

        def progress(done: int, total: int) -> None:
            nonlocal begin, bar
            begin = begin or time.monotonic()  # the time before the first byte is not part of reading
            late = time.monotonic() - begin >= SHOW_LOADING_AFTER
            if bar is None and late and total >= MEGABYTE:
                bar = ProgressBar(name, total // MEGABYTE, "MB", self._stream)
            if bar is not None:
                bar.reach(done // MEGABYTE, "")

        try:
            yield progress
        finally:
            if bar is not None:
                bar.close()
