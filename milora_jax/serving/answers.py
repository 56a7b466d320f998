"""Answers in the shape of OpenAI's API: whole, and in the pieces of a stream."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from milora_jax.generation.request import TokenLogprobs
from milora_jax.serving.schema import Chat, Completion
from milora_jax.serving.service import Piece, Turn
from milora_jax.types import EXPERTS

LEAST_LOGPROB = -9999.0
"""JSON has no minus infinity."""


def as_json(value: Any) -> bytes:
    """Bytes of a JSON value; a number that JSON does not have is an error of ours."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


@dataclass
class Sample:
    """One sample, as far as it has come."""

    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: str | None = None


@dataclass
class Writer:
    """Writes the answer to one request.

    Args:
      say: the text of a token.
    """

    asked: Completion | Chat
    turn: Turn
    say: Callable[[int], str]
    samples: list[Sample] = field(init=False)
    route: np.ndarray | None = None
    new_tokens: int = 0

    def __post_init__(self) -> None:
        self.samples = [Sample() for _ in range(self.asked.n or 1)]

    def add(self, piece: Piece) -> None:
        """Take a piece of a whole answer."""
        sample = self.samples[piece.sample]
        self.new_tokens += len(piece.tokens)
        sample.text.append(piece.text)
        sample.tokens += piece.tokens
        sample.logprobs += piece.logprobs
        sample.finish = piece.finish or sample.finish
        self.route = piece.route if piece.route is not None else self.route

    def whole(self) -> dict[str, Any]:
        """The answer of all pieces."""
        choices = []
        for i, sample in enumerate(self.samples):
            text = "".join(sample.text)
            said = {"message": {"role": "assistant", "content": text}} if self._chats else {"text": text}
            logprobs = self._logprobs(sample.tokens, sample.logprobs)
            choices.append({"index": i, **said, "logprobs": logprobs, "finish_reason": sample.finish})
        return {**self._head(""), "choices": choices, "usage": self.usage(), **self._told_route(self.route)}

    def first(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        if not self._chats:
            return []
        delta = {"role": "assistant", "content": ""}
        return [
            {
                **self._head(".chunk"),
                "choices": [_choice(i, {"delta": delta}, None, None)],
                **self._no_usage(),
            }
            for i in range(len(self.samples))
        ]

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A piece of a stream."""
        self.new_tokens += len(piece.tokens)
        delta = {"content": piece.text} if piece.text or not piece.finish else {}
        said = {"delta": delta} if self._chats else {"text": piece.text}
        choice = _choice(piece.sample, said, self._logprobs(piece.tokens, piece.logprobs), piece.finish)
        route = self._told_route(piece.route)
        return {**self._head(".chunk"), "choices": [choice], **self._no_usage(), **route}

    def last(self) -> list[dict[str, Any]]:
        """What a stream ends with, before its mark."""
        if not self.asked.counts_usage:
            return []
        return [{**self._head(".chunk"), "choices": [], "usage": self.usage()}]

    def usage(self) -> dict[str, int]:
        """Tokens of prompt and samples."""
        prompt, new = self.turn.prompt_tokens, self.new_tokens
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    @property
    def _chats(self) -> bool:
        return isinstance(self.asked, Chat)

    def _head(self, chunk: str) -> dict[str, Any]:
        kind = f"chat.completion{chunk}" if self._chats else "text_completion"
        turn = self.turn
        return {"id": turn.id, "object": kind, "created": turn.created, "model": turn.model}

    def _no_usage(self) -> dict[str, None]:
        return {"usage": None} if self.asked.counts_usage else {}

    def _told_route(self, route: np.ndarray | None) -> dict[str, Any]:
        if route is None or not self.asked.tells_route:
            return {}
        return {"milora": {"experts": list(EXPERTS), "route": route.astype(float).round(6).tolist()}}

    def _logprobs(self, tokens: Sequence[int], found: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if not self.asked.alternatives():
            return None
        pairs = list(zip(tokens, found, strict=True))
        if isinstance(self.asked, Chat):
            return {"content": [self._chat_logprob(token, mine) for token, mine in pairs]}
        asked = self.asked.logprobs or 0
        return {
            "tokens": [self.say(token) for token, _ in pairs],
            "token_logprobs": [_number(mine.logprob) for _, mine in pairs],
            "top_logprobs": [
                {self.say(token): _number(value) for token, value in mine.top[:asked]} for _, mine in pairs
            ],
        }

    def _chat_logprob(self, token: int, mine: TokenLogprobs) -> dict[str, Any]:
        asked = (self.asked.top_logprobs or 0) if isinstance(self.asked, Chat) else 0
        top = [self._one(other, value) for other, value in mine.top[:asked]]
        return {**self._one(token, mine.logprob), "top_logprobs": top}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.say(token)
        return {"token": text, "logprob": _number(logprob), "bytes": list(text.encode())}


def _choice(
    index: int, said: dict[str, Any], logprobs: dict[str, Any] | None, finish: str | None
) -> dict[str, Any]:
    return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}


def _number(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
