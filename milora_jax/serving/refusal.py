"""Errors in the shape of OpenAI's: a status, and one object that says what is wrong."""

from __future__ import annotations

from typing import Any

INTERNAL = "The server could not complete the request."
"""All that is said of an error of ours."""


class Refusal(Exception):
    """A request that is not served.

    Attributes:
      status: of HTTP.
      body: the JSON object of the answer.
      retry_after: seconds after which it is worth trying again; 0 where it is not.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after: int = 0,
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        self.body: dict[str, Any] = {
            "error": {"message": message, "type": kind, "param": param, "code": code}
        }

    def __reduce__(self) -> tuple[Any, ...]:
        """For sending it to another process: an exception is taken apart into its message alone."""
        return _again, (self.status, self.retry_after, self.body["error"])


def _again(status: int, retry_after: int, error: dict[str, Any]) -> Refusal:
    kept = {"kind": error["type"], "code": error["code"], "param": error["param"]}
    return Refusal(status, error["message"], retry_after=retry_after, **kept)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> Refusal:
    """What the client can mend."""
    return Refusal(400, message, param=param, code=code)


def no_such_model(name: str) -> Refusal:
    """The same answer for an adapter that is not there and for one that is another tenant's."""
    return Refusal(404, f"The model {name[:80]!r} does not exist.", param="model", code="model_not_found")


def forbidden() -> Refusal:
    """A key that is right, for a call that it may not make."""
    return Refusal(403, "This key may not make this call.", kind="permission_error")


def no_key() -> Refusal:
    """The answer to whoever has no key, or a wrong one."""
    return Refusal(401, "Incorrect API key provided.", kind="authentication_error", code="invalid_api_key")


def too_many(message: str) -> Refusal:
    """A tenant's own limit is reached."""
    return Refusal(429, message, kind="rate_limit_error", code="rate_limit_exceeded", retry_after=1)


def overloaded(message: str) -> Refusal:
    """The server's limit is reached, or it is stopping."""
    return Refusal(503, message, kind="server_error", code="overloaded", retry_after=1)


def internal() -> Refusal:
    """An error of ours, of which nothing is told."""
    return Refusal(500, INTERNAL, kind="server_error", code="internal_error")
