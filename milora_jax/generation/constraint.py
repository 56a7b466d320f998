"""What a row may write next, decided on the host while the device runs the model.

A constraint is any object with the methods of :class:`Constraint`; ``serving.structured`` makes them from
grammars. Masks are packed: bit *i* of word *w* stands for token *32 w + i*.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

BITS = 32


class ConstraintError(Exception):
    """A constraint cannot be followed any further; its message says why, for the one who asked for it."""


@runtime_checkable
class Constraint(Protocol):
    """The tokens that one sample may get, given those that it has got."""

    def mask(self) -> np.ndarray:
        """The tokens that may come next, packed uint32 ``[ceil(V / 32)]``.

        Raises:
          ConstraintError: no token may, or they cannot be found within the constraint's limits.
        """
        ...

    def accept(self, token: int) -> None:
        """Take the token that was chosen.

        Raises:
          ConstraintError: it is not allowed, or a limit of the constraint is reached.
        """
        ...

    def copy(self) -> Constraint:
        """Another one in the same state, for another sample."""
        ...


def words_of(vocab_size: int) -> int:
    """Words of a packed mask.

    >>> words_of(32), words_of(33)
    (1, 2)
    """
    return -(-vocab_size // BITS)


def full_masks(rows: int, vocab_size: int) -> np.ndarray:
    """Masks that allow every token."""
    return np.full((rows, words_of(vocab_size)), 2**BITS - 1, np.uint32)


class AnyToken:
    """Allows every token: it compiles the programs of constrained batches before a constraint is there."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def mask(self) -> np.ndarray:
        """All tokens."""
        return full_masks(1, self._vocab_size)[0]

    def accept(self, token: int) -> None:
        """Change nothing."""

    def copy(self) -> AnyToken:
        """Itself: it has no state."""
        return self
