"""Constraints on the next tokens of a row, computed on the host while the device runs the model.

A constraint is any object with the methods of :class:`Constraint`; ``serving.structured`` makes them from
grammars. Masks are packed: bit *i* of word *w* stands for token *32 w + i*.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

BITS = 32


class ConstraintError(Exception):
    """A constraint cannot be followed any further; the message gives the reason to the client."""


@runtime_checkable
class Constraint(Protocol):
    """The tokens that one sample may get, given its tokens so far."""

    def mask(self) -> np.ndarray:
        """Return the tokens that may come next, packed uint32 ``[ceil(V / 32)]``.

        Raises:
          ConstraintError: no token may, or they cannot be found within the constraint's limits.
        """
        ...

    def accept(self, token: int) -> None:
        """Accept the token that was chosen.

        Raises:
          ConstraintError: it is not allowed, or a limit of the constraint is reached.
        """
        ...

    def copy(self) -> Constraint:
        """Return a constraint in the same state, for another sample."""
        ...


def words_of(vocab_size: int) -> int:
    """Return the number of words of a packed mask.

    >>> words_of(32), words_of(33)
    (1, 2)
    """
    return -(-vocab_size // BITS)


def full_masks(rows: int, vocab_size: int) -> np.ndarray:
    """Return masks that allow every token."""
    return np.full((rows, words_of(vocab_size)), 2**BITS - 1, np.uint32)


class AnyToken:
    """Allows every token, so that constrained programs can be compiled before there is a constraint."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def mask(self) -> np.ndarray:
        """Return a mask of all tokens."""
        return full_masks(1, self._vocab_size)[0]

    def accept(self, token: int) -> None:
        """Change nothing."""

    def copy(self) -> AnyToken:
        """Return the object itself, which has no state."""
        return self
