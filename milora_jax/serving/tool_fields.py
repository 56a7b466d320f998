"""The fields of a chat that offer tools, as pydantic models."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from milora_jax.serving.api_errors import bad_request
from milora_jax.serving.format_fields import Schema
from milora_jax.serving.limits import Limits
from milora_jax.serving.request_base import RequestBase
from milora_jax.serving.structured import require_small

MOST_TOOLS = 128
"""Most tools of a request, as in OpenAI's API."""

ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class Function(RequestBase):
    """A function that the model may call. Without ``parameters`` it has none."""

    name: ToolName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(RequestBase):
    """A tool."""

    type: Literal["function"]
    function: Function

    @property
    def for_template(self) -> dict[str, Any]:
        """The tool as chat templates take it: ``strict`` is for the sampler."""
        function = self.function.model_dump(exclude_unset=True, exclude={"strict"})
        return {"type": "function", "function": function}


class FunctionName(RequestBase):
    """The name of a function."""

    name: ToolName


class NamedTool(RequestBase):
    """The tool that the model has to call."""

    type: Literal["function"]
    function: FunctionName


class CalledFunction(RequestBase):
    """A call in a message: the arguments are a JSON object, as text."""

    name: Annotated[str, Field(max_length=64)]
    arguments: str


class ToolCall(RequestBase):
    """A call that the assistant has made earlier in the chat."""

    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"]
    function: CalledFunction
    index: int | None = None

    def for_template(self) -> dict[str, Any]:
        """Return the call as chat templates take it: the arguments are an object.

        Raises:
          APIError: they are none.
        """
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise bad_request("messages: the arguments of a tool call are no JSON object.", "messages")
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.function.name, "arguments": arguments},
        }


class ToolMessageFields(RequestBase):
    """The fields of a message that belong to tools."""

    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_TOOLS)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None


class ToolFields(RequestBase):
    """The fields of a chat that offer tools."""

    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    def _require_tools(self) -> None:
        choice, names = self.tool_choice, [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise bad_request("tools: two of them have the same name.", "tools")
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise bad_request("tool_choice: it names a function that is not in tools.", "tool_choice")
        if choice == "required" and not names:
            raise bad_request("tool_choice: a call is required, and there are no tools.", "tool_choice")

    @property
    def calls_wanted(self) -> bool:
        """Whether the reply may hold calls."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def forced_tools(self) -> list[Tool]:
        """The tools of which one has to be called; empty where none has to be."""
        if isinstance(choice := self.tool_choice, NamedTool):
            return [tool for tool in self.tools or () if tool.function.name == choice.function.name]
        return list(self.tools or ()) if choice == "required" else []

    @property
    def one_call(self) -> bool:
        """Whether there may be one call only."""
        return self.parallel_tool_calls is False or isinstance(self.tool_choice, NamedTool)

    def tools_for_template(self, limits: Limits) -> list[dict[str, Any]]:
        """The tools, as chat templates take them.

        Raises:
          APIError: they are too long, or not those of ``tool_choice``; naming the field.
        """
        self._require_tools()
        found = [tool.for_template for tool in self.tools or ()]
        try:
            require_small(json.dumps(found), "tools", limits)
        except RecursionError:
            raise bad_request("tools: nested too deeply.", "tools") from None
        return found
