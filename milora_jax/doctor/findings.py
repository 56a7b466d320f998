"""What a check says, and how a check that breaks is reported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from milora_jax.errors import UserError, printable

OK, WARN, FAIL = "ok", "warn", "fail"

LONGEST = 500
"""Characters of a line: what other libraries raise may be pages."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
      level: ok, warn (the run works, but look at it) or fail (it does not, or not as meant).
      check: what was looked at.
      text: what was found and, unless ok, what to do.
    """

    level: str
    check: str
    text: str

    def line(self) -> str:
        """For people."""
        return printable(f"{self.level:<5} {self.check:<11} {self.text}")

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def guarded(check: str, look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """What a check finds; one that raises has failed, in one line, and the other checks go on."""
    try:
        yield from look()
    except UserError as error:
        yield Finding(FAIL, check, " ".join(str(error).split())[:LONGEST])
    except Exception as error:  # a check looks at what may be broken in any way
        reason = " ".join(str(error).split())[:LONGEST]
        yield Finding(FAIL, check, f"{type(error).__name__}: {reason}" if reason else type(error).__name__)
