"""Tools that a chat offers and the calls of them, as rows hold them.

OpenAI's fine-tuning files and TRL: ``tools`` beside ``messages``, and ``tool_calls`` in an assistant's
message, whose arguments are an object or its JSON text. LLaMA-Factory: ``tools`` beside ``conversations``,
and a message ``function_call`` whose text is the call. Each may be JSON text as a whole, because Arrow files,
which have one type per column, write nulls for the fields that another row has.

Templates get all of them in one form, the one in which the server gives them to the same template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from milora_jax.errors import UserError

Call = Mapping[str, Any]
"""A call as chat templates take it: ``{"type": "function", "function": {"name", "arguments"}}``."""

TOOLS = "tools"
CALLS = "tool_calls"


def read_tools(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    """Read the tools of a row: JSON schemas of functions, as they are.

    Args:
      value: a list of tools, or its JSON text.
      where: file and line, for errors.

    Raises:
      UserError: it is no list, a tool has no name, or two have the same; the error begins with ``where``.
    """
    place = f"{where}: field {TOOLS!r}"
    listed = _list(_parsed(value, place), place, "tools")
    tools = [_object(_parsed(tool, place), f"{place}: tool {i}") for i, tool in enumerate(listed, 1)]
    names = [_name(tool, f"{place}: tool {i}") for i, tool in enumerate(tools, 1)]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{place}: two tools are named {name!r}")
    return tuple(tools)


def read_calls(value: Any, where: str) -> tuple[Call, ...]:
    """Read the calls of an assistant's message.

    Args:
      value: a list of calls, or its JSON text.
      where: file, line and message, for errors.

    Raises:
      UserError: one has no name, or arguments that are no object; the error begins with ``where``.
    """
    place = f"{where}: field {CALLS!r}"
    listed = _list(_parsed(value, place), place, "calls")
    return tuple(_call(item, f"{place}: call {i}") for i, item in enumerate(listed, 1))


def read_call_text(text: str, where: str) -> tuple[Call, ...]:
    """Read the message ``function_call`` of LLaMA-Factory: one call as JSON text, or a list of them.

    Raises:
      UserError: as :func:`read_calls`.
    """
    parsed = _parsed(text, where)
    listed = parsed if isinstance(parsed, list) else [parsed]
    return tuple(_call(item, f"{where}: call {i}") for i, item in enumerate(listed, 1))


def _call(item: Any, where: str) -> Call:
    call = _object(_parsed(item, where), where)
    kind = call.get("type")
    if kind not in (None, "function"):
        raise UserError(f"{where}: type is {kind!r}, expected 'function'")
    function = _object(_parsed(call["function"], where), where) if "function" in call else call
    given = function.get("arguments")
    name, arguments = _name(call, where), {} if given in (None, "") else _parsed(given, where)
    if not isinstance(arguments, Mapping):
        raise UserError(f"{where}: arguments are {type(arguments).__name__}, expected an object")
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**identity, "type": "function", "function": {"name": name, "arguments": dict(arguments)}}


def _name(value: Mapping[str, Any], where: str) -> str:
    """The name of a tool or a call, which stands in it or in its ``function``."""
    function = value.get("function")
    name = (function if isinstance(function, Mapping) else value).get("name")
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{where}: it has no name: expected a function with a 'name'")
    return name


def _parsed(value: Any, where: str) -> Any:
    """The value of JSON text; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        reason = error.args[0] if error.args else type(error).__name__
        raise UserError(f"{where}: no JSON ({reason})") from None


def _list(value: Any, where: str, what: str) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"{where} holds {type(value).__name__}, expected a list of {what}")
    return value


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected an object, found {type(value).__name__}")
    return value
