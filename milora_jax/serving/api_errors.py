"""Errors as clients see them, in the form of OpenAI's, and internal errors as the log records them."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path
from typing import Any

log = logging.getLogger("milora_jax.serving")

INTERNAL = "The server could not complete the request."
"""The message that a client gets for any internal error."""


class APIError(Exception):
    """A request that is refused or that failed.

    Attributes:
      status: the HTTP status.
      body: the JSON object of the response.
      retry_after: seconds after which a client may try again; 0 where trying again is of no use.
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
        """Pickle all arguments: an exception keeps its message alone, and Ray sends it between processes."""
        return _rebuild, (self.status, self.retry_after, self.body["error"])


def _rebuild(status: int, retry_after: int, error: dict[str, Any]) -> APIError:
    kept = {"kind": error["type"], "code": error["code"], "param": error["param"]}
    return APIError(status, error["message"], retry_after=retry_after, **kept)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> APIError:
    """Return an error that the client can correct."""
    return APIError(400, message, param=param, code=code)


def model_not_found(name: str) -> APIError:
    """Return the same error for an adapter that does not exist and for one of another tenant."""
    return APIError(404, f"The model {name[:80]!r} does not exist.", param="model", code="model_not_found")


def forbidden() -> APIError:
    """Return the error for a valid key that may not make this call."""
    return APIError(403, "This key may not make this call.", kind="permission_error")


def invalid_key() -> APIError:
    """Return the error for a missing or wrong key."""
    return APIError(401, "Incorrect API key provided.", kind="authentication_error", code="invalid_api_key")


def rate_limited(message: str) -> APIError:
    """Return the error for a tenant that has reached one of its limits."""
    return APIError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", retry_after=1)


def overloaded(message: str) -> APIError:
    """Return the error of a server that has reached one of its limits, or is stopping."""
    return APIError(503, message, kind="server_error", code="overloaded", retry_after=1)


def internal_error() -> APIError:
    """Return the error for an internal failure, without its details."""
    return APIError(500, INTERNAL, kind="server_error", code="internal_error")


def log_error(what: str, error: BaseException) -> None:
    """Log that something failed: the type of the error and where it was raised, never its message.

    The message of an exception may quote a prompt, a path or a key.
    """
    frames = traceback.extract_tb(error.__traceback__)
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
    log.error("%s: %s at %s", what, type(error).__name__, places)
