"""The result of a check, and the report of a check that breaks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from milora_jax.errors import UserError, printable

OK, WARN, FAIL = "ok", "warn", "fail"

LONGEST = 500
"""Characters of a line; errors of other libraries may be pages long."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
      level: ok, warn (the run works, but look at it) or fail (it does not, or not as meant).
      check: name of the check.
      text: what was found and, unless ok, what to do.
    """

    level: str
    check: str
    text: str

    def line(self) -> str:
        """The finding as a line for people."""
        return printable(f"{self.level:<5} {self.check:<11} {self.text}")

    def to_json(self) -> dict[str, Any]:
        """The finding as JSON for programs."""
        return asdict(self)


def guarded(check: str, look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Yield the findings of a check; a check that raises fails in one line, and the other checks continue."""
    try:
        yield from look()
    except UserError as error:
        yield Finding(FAIL, check, " ".join(str(error).split())[:LONGEST])
    except Exception as error:  # what is checked may be broken in any way
        reason = " ".join(str(error).split())[:LONGEST]
        yield Finding(FAIL, check, f"{type(error).__name__}: {reason}" if reason else type(error).__name__)
