"""A client of a judge behind OpenAI's chat completions API; one final failure ends all threads' retries."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from milora_jax.errors import UserError, require

RETRIED = (408, 409, 429, 500, 502, 503, 504)
"""Statuses after which the same request may succeed."""

LONGEST_WAIT = 60.0
"""Most seconds between two attempts, whatever the server asks for."""


@dataclass
class JudgeClient:
    """A client of the judge.

    The ``openai`` package sends the requests. Its own retries are off, because they cannot be interrupted,
    and one failure here must end the waiting of all threads.

    Attributes:
      url: the base URL of the API: ``http://HOST:PORT/v1``.
      key: the bearer token; an empty one is not sent.
      timeout: seconds that a connection may be silent.
      attempts: most times that a request is sent.
      wait: seconds after the first failure, doubled after each further one.
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
        self._api = _api(self.url, self.key, self.timeout)

    def close(self) -> None:
        """Close the connections to the judge."""
        self._api.close()

    def give_up(self) -> None:
        """End the waiting of all threads."""
        self._stopped.set()

    def ask(self, messages: Sequence[dict[str, str]]) -> str:
        """Return the judge's answer. After one failure nothing more is sent: later calls raise the same
        error.

        Raises:
          UserError: the judge refuses the request, or has not answered after the last attempt.
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
        import openai

        unsent = ("OpenAI-Organization", "OpenAI-Project", *([] if self.key else ["Authorization"]))
        for attempt in range(1, self.attempts + 1):
            asked_for = None
            try:
                answer = self._api.chat.completions.create(
                    model=self.model,
                    messages=list(messages),
                    temperature=0,
                    max_tokens=self.max_tokens,
                    # Environment variables may set these for another server.
                    extra_headers=dict.fromkeys(unsent, openai.Omit()),
                )
                text = answer.choices[0].message.content
                if text is None or isinstance(text, str):
                    return (
                        text or ""
                    )  # withheld by a filter or the length limit: a judgment without a verdict
                raise TypeError(type(text))
            except openai.APIStatusError as error:
                reason = f"status {error.status_code}{_said(error.body)}"
                if error.status_code not in RETRIED:
                    raise UserError(f"the judge at {self.url} refuses: {reason}") from None
                asked_for = error.response.headers.get("Retry-After")
            except openai.APITimeoutError:
                reason = f"no answer within {self.timeout:g} s"
            except openai.APIConnectionError as error:
                reason = str(error.__cause__ or error)
            except (openai.APIError, AttributeError, IndexError, TypeError, ValueError, RecursionError):
                raise UserError(
                    f"the judge at {self.url} answers with something that is no chat completion"
                ) from None
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


def _api(url: str, key: str, timeout: float) -> Any:
    """The client of the package ``openai``.

    Raises:
      UserError: the package is missing.
    """
    try:
        import openai
    except ImportError:
        raise UserError("mt-bench judge needs the package openai: pip install 'milora-jax[eval]'") from None
    # A key belongs to one server: a redirect would send it to another.
    http = openai.DefaultHttpxClient(follow_redirects=False)
    return openai.OpenAI(
        base_url=url, api_key=key or "unsent", timeout=timeout, max_retries=0, http_client=http
    )


def _said(body: Any) -> str:
    """The server's message in the body of an error, if there is one."""
    message = body.get("message") if isinstance(body, dict) else None
    return f" ({str(message)[:200]})" if message else ""
