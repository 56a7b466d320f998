"""Compiles a grammar once in another process before it is compiled here.

llguidance bounds most of what a grammar costs, but not all: an intersection of regular expressions can take
minutes, in native code that no thread can interrupt. The process can be killed, and has a limit of memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from typing import Any

BYTES = 2 * 2**30
"""Address space of the process; the vocabulary of a large model takes a quarter of it."""

START_SECONDS = 60.0
"""Time limit for reading the tokenizer, on a busy machine."""

WALL_FACTOR = 10
"""Wall time over processor time, on a busy machine."""

PROGRAM = """
import json, math, resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({size}, {size}))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
given = json.loads(sys.stdin.readline())
limits = LLParserLimits(**given["limits"])
tokenizer = LLTokenizer(given["tokenizer"], n_vocab=given["vocab_size"], eos_token=given["eos_ids"])
print("ready", flush=True)
for line in sys.stdin:
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = math.ceil(used.ru_utime + used.ru_stime + given["seconds"])
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
    matcher = LLMatcher(tokenizer, json.loads(line), log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    print("done", flush=True)
"""


class GrammarTrial:
    """The process, which is started at the first trial and again after a trial has ended it.

    Args:
      tokenizer: its ``tokenizer.json``.
      limits: limits of llguidance's parser.
      seconds: processor time of a trial.
    """

    def __init__(
        self, tokenizer: str, vocab_size: int, eos_ids: list[int], limits: dict[str, Any], seconds: float
    ) -> None:
        given = {"tokenizer": tokenizer, "vocab_size": vocab_size, "eos_ids": eos_ids, "limits": limits}
        self._given, self._seconds = json.dumps({**given, "seconds": seconds}), WALL_FACTOR * seconds
        self._process: subprocess.Popen[str] | None = None
        self._end: weakref.finalize | None = None
        self._lock = threading.Lock()

    def passes(self, source: str) -> bool:
        """Whether a grammar compiles and gives its first mask, or an error, within the limits."""
        with self._lock:
            if self._process is None and not self._start():
                self._kill()
                return False
            if self._answers(json.dumps(source), "done", self._seconds):
                return True
            self._kill()
            return False

    def _start(self) -> bool:
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(size=BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._end = weakref.finalize(self, _end, self._process)
        return self._answers(self._given, "ready", START_SECONDS)

    def _answers(self, line: str, expected: str, seconds: float) -> bool:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            return False
        # A killed process closes its output, which ends the reading.
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            process.stdin.write(f"{line}\n")
            process.stdin.flush()
            return process.stdout.readline().strip() == expected
        except OSError:  # it has ended
            return False
        finally:
            timer.cancel()

    def _kill(self) -> None:
        if self._end is not None:
            self._end()
        self._process = self._end = None


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # what was not written is lost with the process
                pipe.close()
