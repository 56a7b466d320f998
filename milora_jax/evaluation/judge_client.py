"""One question at a time to a server of OpenAI's API, asked again where that may help."""

from __future__ import annotations

import http.client
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from milora_jax.errors import UserError, require

AGAIN = (408, 409, 429, 500, 502, 503, 504)
"""Statuses after which the same request may be answered."""

LONGEST_WAIT = 60.0
"""Seconds between two attempts, at most, whatever the server asks for."""

LARGEST_ANSWER = 2**24
"""Bytes of an answer that are read."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key is for one server: it is not carried to another."""

    def redirect_request(self, *given: Any) -> None:
        """Stay."""


@dataclass
class JudgeClient:
    """A judge.

    Attributes:
      url: of the API, what OpenAI's clients call the base URL: ``http://HOST:PORT/v1``.
      key: sent as a bearer; empty sends none.
      timeout: seconds that a connection may be silent.
      attempts: how often a request is sent at most.
      wait: seconds after the first failure; twice as many after each further one.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    timeout: float = 120.0
    attempts: int = 4
    wait: float = 2.0
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            fits = parts.scheme in ("http", "https") and bool(parts.netloc)
        except ValueError:
            fits = False
        require(fits, "--judge-url", self.url, "http://HOST:PORT/v1 or the like")
        require(self.timeout > 0, "--timeout", self.timeout, "seconds above 0")
        require(self.attempts >= 1, "--attempts", self.attempts, "at least 1")
        self.key = self.key.strip()  # a secret that was read from a file often ends in a newline
        if not (self.key.isascii() and self.key.isprintable()):
            raise UserError("the judge's key has characters that no HTTP header can carry: expected ASCII")
        self._stopped = threading.Event()
        self._failure: UserError | None = None
        self._opener = urllib.request.build_opener(_NoRedirect)

    def give_up(self) -> None:
        """End the waiting of all threads."""
        self._stopped.set()

    def ask(self, messages: Sequence[dict[str, str]]) -> str:
        """The judge's answer. After one failure nothing is sent any more: all further requests fail alike.

        Raises:
          UserError: it refuses the request, or has not answered after the last attempt.
        """
        if self._failure is not None:
            raise self._failure
        try:
            return self._asked(messages)
        except UserError as error:
            self._failure = self._failure or error
            self.give_up()
            raise self._failure from None

    def _asked(self, messages: Sequence[dict[str, str]]) -> str:
        body = {
            "model": self.model,
            "messages": list(messages),
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
        )
        for attempt in range(1, self.attempts + 1):
            asked_for = None
            try:
                with self._opener.open(request, timeout=self.timeout) as answer:
                    return self._text(answer.read(LARGEST_ANSWER))
            except urllib.error.HTTPError as error:
                reason = f"status {error.code}{_said(error)}"
                if error.code not in AGAIN:
                    raise UserError(f"the judge at {self.url} refuses: {reason}") from None
                asked_for = error.headers.get("Retry-After")
            except TimeoutError:
                reason = f"no answer within {self.timeout:g} s"
            except (OSError, http.client.HTTPException) as error:
                cause = getattr(error, "reason", error)
                slow = isinstance(cause, TimeoutError)
                reason = (
                    f"no answer within {self.timeout:g} s" if slow else str(cause) or type(cause).__name__
                )
            last = attempt == self.attempts
            if last or self._stopped.wait(self._pause(attempt, asked_for)):
                break
        raise UserError(
            f"the judge at {self.url} does not answer after {attempt} attempts: {reason}; finished judgments "
            "are kept, run the same command again to go on"
        )

    def _pause(self, attempt: int, asked_for: str | None) -> float:
        """Seconds before the next attempt: what the server asks for, or longer each time."""
        try:
            wanted = float(asked_for) if asked_for else 0.0
        except ValueError:  # a date
            wanted = 0.0
        return min(LONGEST_WAIT, max(wanted, self.wait * 2 ** (attempt - 1)))

    def _text(self, content: bytes) -> str:
        """What the judge says; "" where it was kept from saying anything: a judgment without a verdict."""
        try:
            text = json.loads(content)["choices"][0]["message"]["content"]
            text = "" if text is None else text
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise UserError(f"the judge at {self.url} answers with something that is no chat completion")
        return text


def _said(error: urllib.error.HTTPError) -> str:
    """The server's own words, if it has any."""
    try:
        message = json.loads(error.read(LARGEST_ANSWER))["error"]["message"]
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        return ""
    return f" ({str(message)[:200]})"
