"""Match names of modules against regular expressions of foreign files, in time that a file cannot choose.

Python's ``re`` backtracks: a pattern of twenty characters can keep it busy for years. Here a part of a
pattern maps a place in a name to the places where it may end, and every part is asked once for each place.
The cost is at most (length of the pattern) times (length of the name) squared, and bounded besides. What has
no such form, look-around and references to groups, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from milora_jax.errors import UserError

LARGEST_PATTERN = 4096
"""Characters of the longest pattern; a pattern that names every kind of module has a few hundred."""

MOST_STEPS = 4000
"""Pairs of a part and a place that are looked at for one name; Unsloth's expressions take a hundred."""

DEEPEST = 50
"""Groups within groups."""

MOST_REPEATS = 1000
"""The largest number in a ``{m,n}``."""

Ends = frozenset[int]
NOWHERE: Ends = frozenset()
Step = Callable[[str, int, dict[tuple[int, int], Ends]], Ends]
"""Maps a name and a place in it to the places where a part of a pattern may end there."""

_PLAIN = re.compile(r"\^?[\w.-]*", re.ASCII)
_COUNTS = re.compile(r"\{(?:([0-9]+)|([0-9]*),([0-9]*))\}")
_LITERALS = re.compile(r"[A-Za-z0-9_]+(?![*+?{])")
"""Characters that stand for themselves; one before a quantifier is a part of its own."""
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]")
_RESERVED = ("[", "--", "&&", "~~", "||")
"""What ``re`` keeps for operations on sets."""
_CHARACTERS, _PLACES = "dDwWsS", "bBAZ"


class Pattern:
    """A regular expression in the syntax of ``re``.

    Attributes:
      plain: whether it is a name, perhaps with ``^`` before it; a dot fits any character.

    Args:
      text: the expression.
      where: what it is, for errors.

    Raises:
      UserError: it is no regular expression, or too large, or uses what is not supported.
    """

    def __init__(self, text: str, where: str) -> None:
        if len(text) > LARGEST_PATTERN:
            raise UserError(f"{where}: {len(text)} characters, expected at most {LARGEST_PATTERN}")
        # Nothing in a plain pattern is repeated: ``re`` has nothing to go back over, and is quicker.
        self.plain = _PLAIN.fullmatch(text) is not None
        self._text = text
        self._ends = _Parser(text, where).whole() if not self.plain else None

    def fits(self, name: str) -> bool:
        """Whether it matches a whole name, as ``re.fullmatch`` does."""
        if self._ends is None:
            return re.fullmatch(self._text, name) is not None
        return len(name) in self._ends(name, 0, {})

    def fits_tail(self, name: str) -> bool:
        """Whether it matches a name from its start or from behind one of its dots, to its end."""
        if self._ends is None:
            return re.match(rf"(?:.*\.)?(?:{self._text})$", name) is not None
        ends, memo = self._ends, {}
        starts = (0, *(at + 1 for at, character in enumerate(name) if character == "."))
        return any(len(name) in ends(name, start, memo) for start in starts)


class _Parser:
    """Recursive descent over one expression."""

    def __init__(self, text: str, where: str) -> None:
        self._text, self._where, self._at, self._depth, self._steps = text, where, 0, 0, 0

    def whole(self) -> Step:
        step = self._alternatives()
        if self._at < len(self._text):
            raise self._error("unbalanced parenthesis")
        return step

    def _error(self, reason: str) -> UserError:
        return UserError(f"{self._where}: {reason} at character {self._at} of {self._text[:200]!r}")

    def _next(self) -> str:
        return self._text[self._at : self._at + 1]

    def _once(self, ends: Step) -> Step:
        """The step, asked once for each place."""
        number, self._steps = self._steps, self._steps + 1

        def step(name: str, start: int, memo: dict[tuple[int, int], Ends]) -> Ends:
            key = number, start
            if key not in memo:
                if len(memo) >= MOST_STEPS:
                    raise UserError(f"{self._where}: too much work for {name[:200]!r}: not supported")
                memo[key] = ends(name, start, memo)
            return memo[key]

        return step

    def _alternatives(self) -> Step:
        choices = [self._sequence()]
        while self._next() == "|":
            self._at += 1
            choices.append(self._sequence())
        if len(choices) == 1:
            return choices[0]
        return self._once(
            lambda name, start, memo: NOWHERE.union(*(choice(name, start, memo) for choice in choices))
        )

    def _sequence(self) -> Step:
        parts = []
        while self._next() not in ("", "|", ")"):
            parts.append(self._repeated())

        def ends(name: str, start: int, memo: dict[tuple[int, int], Ends]) -> Ends:
            found = frozenset((start,))
            for part in parts:
                found = _after(part, name, found, memo)
            return found

        return parts[0] if len(parts) == 1 else self._once(ends)

    def _repeated(self) -> Step:
        part, is_place = self._atom()
        counts = self._counts()
        if counts is None:
            return part
        if is_place:
            raise self._error("nothing to repeat")
        if self._next() == "?":  # which match is preferred does not decide whether there is one
            self._at += 1
        elif self._next() == "+":
            raise self._error("a possessive quantifier is not supported")
        if self._counts() is not None:
            raise self._error("multiple repeat")
        least, most = counts

        def ends(name: str, start: int, memo: dict[tuple[int, int], Ends]) -> Ends:
            at = frozenset((start,))
            for _ in range(least):
                further = _after(part, name, at, memo)
                if further == at:
                    break
                at = further
            found, count = at, least
            while at and (most is None or count < most):
                at = _after(part, name, at, memo) - found
                found, count = found | at, count + 1
            return found

        return self._once(ends)

    def _counts(self) -> tuple[int, int | None] | None:
        """The bounds of a quantifier that stands here, if there is one."""
        simple: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if self._next() in simple:
            self._at += 1
            return simple[self._text[self._at - 1]]
        braces = _COUNTS.match(self._text, self._at)
        if braces is None:
            return None
        least, most = (braces[1], braces[1]) if braces[1] else (braces[2] or "0", braces[3])
        if max(len(least), len(most)) > len(str(MOST_REPEATS)) or int(most or least) > MOST_REPEATS:
            raise self._error(f"over {MOST_REPEATS} repeats are not supported")
        if most and int(most) < int(least):
            raise self._error("a range of repeats that ends before it begins")
        self._at = braces.end()
        return int(least), int(most) if most else None

    def _atom(self) -> tuple[Step, bool]:
        """The step of one character, place or group, and whether it is a place."""
        character = self._next()
        if character == "(":
            return self._group(), False
        if character in ("*", "+", "?"):
            raise self._error("nothing to repeat")
        if character == "[":
            found = _CLASS.match(self._text, self._at)
            if found is None:
                raise self._error("unterminated character set")
            if any(doubled in found[0][1:] for doubled in _RESERVED):
                raise self._error(f"the set {found[0][:80]} is not supported")
            return self._token(found[0], found[0]), False
        if character == "\\":
            escaped = self._text[self._at + 1 : self._at + 2]
            known = escaped in _CHARACTERS or escaped in _PLACES
            if not escaped or (escaped.isalnum() and not known):
                raise self._error(f"\\{escaped} is not supported")
            token = f"\\{escaped}" if known else re.escape(escaped)
            return self._token(f"\\{escaped}", token), escaped in _PLACES
        run = _LITERALS.match(self._text, self._at)
        if run:
            return self._token(run[0], run[0]), False
        is_place = character in ("^", "$")
        return self._token(character, character if is_place or character == "." else re.escape(character)), (
            is_place
        )

    def _token(self, written: str, token: str) -> Step:
        """The step of something that ``re`` matches without a choice."""
        try:
            compiled = re.compile(token)
        except re.error as error:
            raise self._error(str(error)) from None
        self._at += len(written)

        def ends(name: str, start: int, memo: dict[tuple[int, int], Ends]) -> Ends:
            del memo
            found = compiled.match(name, start)
            return NOWHERE if found is None else frozenset((found.end(),))

        return ends

    def _group(self) -> Step:
        opening = re.compile(r"\((?:\?:|\?P<[A-Za-z_]\w*>|(?!\?))").match(self._text, self._at)
        if opening is None:
            raise self._error(f"{self._text[self._at : self._at + 3]!r} is not supported")
        self._at, self._depth = opening.end(), self._depth + 1
        if self._depth > DEEPEST:
            raise self._error(f"over {DEEPEST} groups within groups are not supported")
        step = self._alternatives()
        if self._next() != ")":
            raise self._error("missing ), unterminated group")
        self._at, self._depth = self._at + 1, self._depth - 1
        return step


def _after(part: Step, name: str, starts: Iterable[int], memo: dict[tuple[int, int], Ends]) -> Ends:
    """Where a part may end that begins at one of the places."""
    return frozenset(end for start in starts for end in part(name, start, memo))
