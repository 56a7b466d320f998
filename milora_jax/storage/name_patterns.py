"""Match names of modules against regular expressions of foreign files, in time that a file cannot choose.

Python's ``re`` backtracks and cannot be stopped: a pattern of twenty characters can keep it busy for years.
The ``regex`` package backtracks as well, and takes a time limit. What ``re`` refuses, or reads in another
way, is refused, so that a pattern means what it means to PEFT.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from typing import Any

from milora_jax.errors import UserError

LARGEST_PATTERN = 4096
"""Characters of the longest pattern; a pattern that names every kind of module has a few hundred."""

MOST_REPEATS = 10_000
"""The largest product of the numbers in ``{m,n}``: ``regex`` writes some repeats out when it compiles."""

BUDGET = 1.0
"""Seconds of processor time that one pattern may take over all names; a name takes some microseconds."""

_PLAIN = re.compile(r"\^?[\w.-]*", re.ASCII)
_COUNTS = re.compile(r"\{([0-9]*)(?:,([0-9]*))?\}")


class Pattern:
    """A regular expression in the syntax of ``re``.

    Attributes:
      plain: whether it is a name, perhaps with ``^`` before it; a dot fits any character.

    Args:
      text: the expression.
      where: what it is, for errors.
      tail: whether a name also fits that has other parts, which end with a dot, before what is matched.

    Raises:
      UserError: it is no regular expression, or too large.
    """

    def __init__(self, text: str, where: str, tail: bool = False) -> None:
        if len(text) > LARGEST_PATTERN:
            raise UserError(f"{where}: {len(text)} characters, expected at most {LARGEST_PATTERN}")
        self.plain = _PLAIN.fullmatch(text) is not None
        self._text, self._where, self._left = text, where, BUDGET
        self._compiled = self._compile(rf"(?:.*\.)?(?:{text})" if tail else text)

    def fits(self, name: str) -> bool:
        """Whether it matches a whole name, as ``re.fullmatch`` does.

        Raises:
          UserError: the pattern takes too long.
        """
        if self.plain:
            return self._compiled.fullmatch(name) is not None
        before = time.process_time()
        try:
            return self._compiled.fullmatch(name, timeout=max(self._left, 1e-3)) is not None
        except TimeoutError:
            raise self._error(f"it takes too long for {name[:200]!r}") from None
        finally:
            self._left -= time.process_time() - before

    def _compile(self, text: str) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", FutureWarning)  # of sets whose meaning ``re`` keeps for later
                accepted = re.compile(text)
        except RecursionError:
            raise self._error("its groups are nested too deeply") from None
        except re.error as error:
            raise self._error(error.msg) from None
        except (OverflowError, FutureWarning) as error:
            raise self._error(str(error)) from None
        if self.plain:  # nothing is repeated, so that ``re`` has nothing to go back over
            return accepted
        # Other braces mean approximate matching to ``regex``, and characters that no name has to ``re``.
        if "{" in _COUNTS.sub("", text):
            raise self._error("a brace that is no {m,n} is not supported")
        counts = (
            max(int(number or 1) for number in found.groups(default="1")) for found in _COUNTS.finditer(text)
        )
        if math.prod(max(1, count) for count in counts) > MOST_REPEATS:
            raise self._error(f"over {MOST_REPEATS} repeats are not supported")
        import regex  # patterns that are more than a name are rare

        try:
            return regex.compile(text, regex.VERSION0)
        except (regex.error, RecursionError) as error:
            raise self._error(str(error)) from None

    def _error(self, reason: str) -> UserError:
        return UserError(f"{self._where}: {reason}: {self._text[:200]!r}")
