"""Constraints for the tests of decoding."""

import numpy as np

from milora_jax.generation.constraint import BITS, ConstraintError, words_of
from tests.models import TINY

(END,) = TINY.eos_ids


def packed(tokens, vocab_size=TINY.vocab_size):
    """A mask of some tokens."""
    mask = np.zeros(words_of(vocab_size), np.uint32)
    for token in tokens:
        mask[token // BITS] |= np.uint32(1 << token % BITS)
    return mask


class Steps:
    """Allows the tokens of one set after the other, then the end; fails at a step, if it is told to."""

    def __init__(self, sets, fails_at=None, accepts=True, vocab_size=TINY.vocab_size):
        self.vocab_size = vocab_size
        self.sets, self.fails_at, self.accepts, self.taken = [*sets, {END}], fails_at, accepts, []

    @property
    def done(self):
        return len(self.taken) >= len(self.sets) - 1

    def mask(self):
        if len(self.taken) == self.fails_at:
            raise ConstraintError("too complex")
        return packed(self.sets[min(len(self.taken), len(self.sets) - 1)], self.vocab_size)

    def accept(self, token):
        if not self.accepts:
            raise ConstraintError("not accepted")
        assert token in self.sets[min(len(self.taken), len(self.sets) - 1)], "only what was allowed"
        self.taken.append(token)

    def copy(self):
        return Steps(self.sets[:-1], self.fails_at, self.accepts, self.vocab_size)


SETS = [{7, 9, 50}, {96}, {3, 4}, {60, 61, 62, 63, 64, 65}, {31, 32}]
