"""The run-time checker of shape annotations for the tests."""

from collections.abc import Callable
from typing import Any

from beartype import beartype


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check a function's shapes; leave dataclasses alone.

    A pytree's fields also hold shardings, ShapeDtypeStructs and None while it is taken apart and put
    together again.
    """
    return function if function.__name__ == "__init__" else beartype(function)
