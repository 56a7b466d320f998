"""Tokens to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer gives for bytes that are not yet a whole character."""

CONTEXT = 8
"""Tokens decoded again before new ones: a token's text may depend on those just before it."""


CHARACTER = 4
"""Bytes of the longest character, and so the most tokens that it can be split into."""


class TextStream:
    """The text of one continuation.

    Args:
      tokenizer: anything with Hugging Face's ``decode``.
      stops: strings that end the text; they are not part of it.
      hidden: tokens that have no text; None for the tokenizer's special tokens.

    Attributes:
      text: all that can be shown so far.
      tokens: those the text was made from.
      stopped: whether a stop string came.
    """

    def __init__(
        self, tokenizer: Any, stops: Sequence[str] = (), hidden: frozenset[int] | None = None
    ) -> None:
        self._tokenizer, self._stops, self._hidden = tokenizer, tuple(stops), hidden
        self._settled, self._settled_tokens = "", 0
        self._shown = 0
        self.text, self.tokens, self.stopped = "", [], False

    def add(self, tokens: Sequence[int], last: bool) -> str:
        """Take more tokens.

        Args:
          last: whether these are the last ones, so that nothing need be held back.

        Returns:
          The text that can be shown beyond what was shown before. Held back are bytes of an unfinished
          character and what may be the beginning of a stop string.
        """
        for token in tokens:
            if self.stopped:
                break
            self.tokens.append(token)
            if self._stops:
                self._look_for_stop()
        if not self.stopped:
            self.text = self._whole() if last else self._without_held_back(self._whole())
        fresh = self.text[self._shown :]
        self._shown = max(self._shown, len(self.text))
        return fresh

    def _look_for_stop(self) -> None:
        whole = self._whole()
        # No stop string begins in text that was shown: its beginning would have been held back.
        found = [place for place in (whole.find(stop, self._shown) for stop in self._stops) if place >= 0]
        if found:
            self.text, self.stopped = whole[: min(found)], True

    def _whole(self) -> str:
        """The text of all tokens, from what is settled and the tokens since."""
        whole = self._up_to(len(self.tokens))
        if len(self.tokens) - self._settled_tokens > 4 * CONTEXT:
            self._settle(whole)
        return whole

    def _up_to(self, count: int) -> str:
        start = max(0, self._settled_tokens - CONTEXT)
        before = self._decode(self.tokens[start : self._settled_tokens])
        return self._settled + self._decode(self.tokens[start:count])[len(before) :]

    def _settle(self, whole: str) -> None:
        """Decode the older tokens no more, where the text between two of them is whole."""
        for count in range(len(self.tokens), len(self.tokens) - CHARACTER, -1):
            text = whole if count == len(self.tokens) else self._up_to(count)
            if not text.endswith(UNFINISHED):
                self._settled, self._settled_tokens = text, count
                return
        # No character is that long: these bytes are none, and would be decoded again for every token.
        self._settled, self._settled_tokens = whole, len(self.tokens)

    def _decode(self, tokens: Sequence[int]) -> str:
        if self._hidden is None:
            return self._tokenizer.decode(tokens, skip_special_tokens=True)
        shown = [token for token in tokens if token not in self._hidden]
        return self._tokenizer.decode(shown, skip_special_tokens=False)

    def _without_held_back(self, whole: str) -> str:
        whole = whole.rstrip(UNFINISHED) if whole.endswith(UNFINISHED) else whole
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(whole)), 0, -1):
            if any(stop.startswith(whole[-size:]) for stop in self._stops):
                return whole[:-size]
        return whole
