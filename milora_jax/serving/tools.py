"""Tool calls in the text of a model: how each family of chat templates writes them.

The family is read off the template. A family gives the grammar of replies that have to call, and the parser
of replies that may.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from milora_jax.data.chat import Message
from milora_jax.data.control_tokens import tool_template
from milora_jax.serving.api_errors import bad_request
from milora_jax.serving.limits import Limits
from milora_jax.serving.structured import Grammar, invalid_grammar, require_few_repeats, schema_patterns
from milora_jax.serving.tool_fields import Tool, ToolFields

MOST_CALLS = 16
"""Most calls of one reply, under a grammar."""

NEAR_END = 8
"""A few characters more than the longest literal name of JSON: an error this near the end of a text may mean
that the text is incomplete."""


@dataclass(frozen=True)
class Call:
    """A call that the model has made; the arguments are the text of a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Family:
    """The format in which some models write calls.

    Attributes:
      name: name of the family.
      marker: what a call begins with; it may be a special token.
      markers: all such texts, which the parser has to see.
      parameters: name of the arguments in the JSON of a call.
    """

    name: str
    marker: str
    markers: tuple[str, ...]
    parameters: str = "arguments"


HERMES = Family("hermes", "<tool_call>", ("<tool_call>", "</tool_call>"))
MISTRAL = Family("mistral", "[TOOL_CALLS]", ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"))
LLAMA3 = Family("llama3", "<|python_tag|>", ("<|python_tag|>",), "parameters")


def family_of(source: str) -> Family | None:
    """Return the family of a chat template; None if the template is of no known family.

    >>> family_of("{{ '<tool_call>' }}").name
    'hermes'
    """
    if "[TOOL_CALLS]" in source:
        return MISTRAL
    if "<tool_call>" in source and "<function=" not in source:
        return HERMES
    if "<|start_header_id|>" in source and '"parameters"' in source:
        return LLAMA3
    return None


def call_grammar(
    family: Family, source: str, tools: Sequence[Tool], one_call: bool, token_of: Callable[[str], int | None]
) -> Grammar:
    """Return the grammar of replies that call one of the tools, with arguments that its schema allows.

    Args:
      source: the chat template.
      token_of: the token of a marker; None where it is no token of its own.

    Raises:
      APIError: a schema cannot be served.
    """

    def literal(text: str) -> str:
        return json.dumps(text)

    def marker(text: str) -> str:
        token = token_of(text)
        return literal(text) if token is None else f"<[{token}]>"

    bare = family is MISTRAL and "[ARGS]" in source
    rules, calls = [], []
    for i, tool in enumerate(tools):
        name = tool.function.name
        rules.append(f"arguments{i}: %json {json.dumps(_arguments_schema(tool))}")
        if bare:
            calls.append(f"{literal(name)} {marker('[ARGS]')} arguments{i}")
        else:
            head = literal(f'{{"name": "{name}", "{family.parameters}": ')
            calls.append(f"{head} arguments{i} {literal('}')}")
    rules.append("call: " + " | ".join(calls))

    def repeated(first: str, more: str) -> str:
        return first if one_call else f"{first} ({more}){{0,{MOST_CALLS - 1}}}"

    if family is HERMES:
        rules.append(f'tagged: {marker("<tool_call>")} "\\n" call "\\n" {marker("</tool_call>")}')
        start = repeated("tagged", '"\\n" tagged')
    elif bare:
        rules.append(f"marked: {marker('[TOOL_CALLS]')} call")
        start = repeated("marked", "marked")
    elif family is MISTRAL:
        opening = literal(" [" if "[TOOL_CALLS] [" in source else "[")
        items = repeated("call", '", " call')
        start = f'{marker("[TOOL_CALLS]")} {opening} {items} "]"'
    else:
        start = "call"
    text = "\n".join([f"start: {start}", *rules])
    return Grammar(json.dumps({"grammars": [{"lark_grammar": text}]}), "tools")


def _arguments_schema(tool: Tool) -> dict[str, Any]:
    given = tool.function.parameters
    schema = {"properties": {}, "additionalProperties": False} if given is None else given
    if schema.get("type", "object") != "object":
        raise invalid_grammar("tools", f"the parameters of {tool.function.name} are no object")
    require_few_repeats(schema_patterns(schema), "tools")
    options = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
    options |= {"lenient": tool.function.strict is False}
    return {**schema, "type": "object", "x-guidance": options}


class ToolCalls:
    """The tool calls of one model.

    Args:
      tokenizer: whose chat template decides the family.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._source = tool_template(tokenizer)
        self._family = None if self._source is None else family_of(self._source)
        added = tokenizer.added_tokens_decoder
        self._tokens = {token.content: i for i, token in added.items()}
        shown = self._family.markers if self._family is not None else ()
        special = {i: token.content for i, token in added.items() if token.special}
        self._hidden = frozenset(i for i, text in special.items() if text not in shown)

    def require_template(self, body: ToolFields, messages: Sequence[Message]) -> None:
        """Refuse tools, and messages of tools, where the chat template cannot write them.

        Raises:
          APIError: naming the field.
        """
        field = "tools" if body.tools else "messages" if any(each.of_tools for each in messages) else ""
        if field and self._source is None:
            message = "The chat template of this model has no place for tools and their calls."
            raise bad_request(message, field, "unsupported_parameter")
        if body.calls_wanted and self._family is None:
            message = "The chat template of this model writes calls in a format that is not known here."
            raise bad_request(message, "tools", "unsupported_parameter")

    def grammar_of(self, body: ToolFields) -> Callable[[Limits], Grammar] | None:
        """Return a function that makes the grammar of a reply that has to call; None where none has to."""
        family, source, tools = self._family, self._source, body.forced_tools
        if not tools or family is None or source is None:
            return None
        return lambda _: call_grammar(family, source, tools, body.one_call, self._tokens.get)

    def parser_of(self, body: ToolFields) -> CallParser | None:
        """Return the parser of one sample; None where no calls are wanted."""
        if not body.calls_wanted or self._family is None:
            return None
        names = frozenset(tool.function.name for tool in body.tools or ())
        return CallParser(self._family, names, body.one_call)

    def hidden_tokens(self, body: ToolFields) -> frozenset[int] | None:
        """Return the tokens without text in a reply that may hold calls, for ``TextStream``."""
        return self._hidden if body.calls_wanted else None


class CallParser:
    """Extracts the calls from a reply as its text arrives.

    A call is given when it is whole; text that looks like one and is none is content.

    Args:
      names: names of the available tools.
      one_call: drop what follows the first call.
    """

    def __init__(self, family: Family, names: frozenset[str], one_call: bool) -> None:
        self._family, self._names, self._one_call = family, names, one_call
        self._held, self._said, self.count = "", False, 0

    def feed(self, text: str, last: bool) -> tuple[str, list[Call]]:
        """Take more text.

        Args:
          last: whether the reply ends with it.

        Returns:
          Content that can be shown, and calls that are whole.
        """
        self._held += text
        content, calls = "", []
        while self._held:
            if self._one_call and self.count:
                self._held = ""
                break
            at = self._begin()
            if at is None:
                content += self._take(len(self._held) if last else self._safe())
                break
            content += self._take(at)
            found = self._read(self._held, last)
            if found is None and not last:
                break
            if not found:
                # Content after all: its marker, or whole if no more is to come.
                content += self._take(len(self._held) if found is None else self._marker_length(), plain=True)
                continue
            made, self._held = found
            made = made[:1] if self._one_call else made
            self.count += len(made)
            calls += made
        return content, calls

    def _take(self, length: int, plain: bool = False) -> str:
        """So much of the held text, as content; blanks around calls are none."""
        text, self._held = self._held[:length], self._held[length:]
        if not plain and not text.strip() and (self.count or (self._held and not self._said)):
            return ""
        self._said = self._said or bool(text.strip())
        return text

    def _marker_length(self) -> int:
        return len(self._family.marker) if self._held.startswith(self._family.marker) else 1

    def _begin(self) -> int | None:
        """Where a call may begin in the held text."""
        at = self._held.find(self._family.marker)
        if self._family is LLAMA3 and not self._said:
            blank = len(self._held) - len(self._held.lstrip())
            if self._held[blank : blank + 1] == "{":
                return blank
        return None if at < 0 else at

    def _safe(self) -> int:
        """Characters of the held text that are content whatever follows."""
        marker = self._family.marker
        for size in range(min(len(marker) - 1, len(self._held)), 0, -1):
            if marker.startswith(self._held[-size:]):
                return len(self._held[:-size].rstrip())
        return len(self._held.rstrip())

    def _read(self, text: str, last: bool) -> tuple[list[Call], str] | tuple[()] | None:
        """The calls at the beginning of a text, and the text behind them.

        Empty if there are none, None if the text is not whole.
        """
        if self._family is HERMES:
            return self._read_hermes(text, last)
        return self._read_mistral(text) if self._family is MISTRAL else self._read_llama(text, last)

    def _read_hermes(self, text: str, last: bool) -> tuple[list[Call], str] | tuple[()] | None:
        opening, closing = self._family.markers
        if closing not in text and not last:
            return None
        found = _json(text, len(opening))
        if not found:
            return found
        rest = text[found[1] :].lstrip()
        call = self._call(found[0])
        if not last and len(rest) < len(closing) and closing.startswith(rest):
            return None
        if call is None or (rest and not rest.startswith(closing)):
            return ()
        return [call], rest.removeprefix(closing)

    def _read_mistral(self, text: str) -> tuple[list[Call], str] | tuple[()] | None:
        text = text.removeprefix(self._family.marker).lstrip()
        if not text:
            return None
        if text[0] == "[" or text[0] == "{":
            found = _json(text, 0)
            if not found:
                return found
            calls = [self._call(each) for each in (found[0] if isinstance(found[0], list) else [found[0]])]
            whole = [call for call in calls if call is not None]
            return (whole, text[found[1] :]) if whole and len(whole) == len(calls) else ()
        named = re.match(r"([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\])?\s*(?=\{)", text)
        if named is None:
            return None if re.fullmatch(r"[\w.-]+\s*(\[[\w\[\]]*\s*)?", text) else ()
        found = _json(text, named.end())
        if not found:
            return found
        call = self._call({"name": named[1], "arguments": found[0]})
        return () if call is None else ([call], text[found[1] :])

    def _read_llama(self, text: str, last: bool) -> tuple[list[Call], str] | tuple[()] | None:
        text = text.removeprefix(self._family.marker)
        calls, at = [], 0
        while True:
            found = _json(text, at)
            if not found:
                return found
            call = self._call(found[0])
            if call is None:
                return ()
            calls.append(call)
            separator = re.compile(r"\s*;\s*").match(text, found[1])
            if separator is None or separator.end() == len(text):
                break
            at = separator.end()
        rest = text[found[1] :].strip(" \n;")
        return None if not last and not rest else () if rest else (calls, "")

    def _call(self, value: Any) -> Call | None:
        if not isinstance(value, dict):
            return None
        name = value.get("name")
        arguments = value.get("arguments", value.get("parameters"))
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            return None
        # Templates of Mistral take ids of nine letters and digits alone.
        tag = secrets.token_hex(5)[:9] if self._family is MISTRAL else f"call_{secrets.token_hex(12)}"
        return Call(tag, name, json.dumps(arguments, ensure_ascii=False))


def _json(text: str, at: int) -> tuple[Any, int] | tuple[()] | None:
    """A JSON value and where it ends; empty if there is none, None if it is not whole."""
    at += len(text[at:]) - len(text[at:].lstrip())
    if at == len(text):
        return None
    try:
        return json.JSONDecoder(parse_constant=_refuse).raw_decode(text, at)
    except json.JSONDecodeError as error:
        whole = error.pos < len(text.rstrip()) - NEAR_END and not error.msg.startswith("Unterminated")
        return () if whole else None
    except (ValueError, RecursionError):
        return ()


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
