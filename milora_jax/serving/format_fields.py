"""The fields of a request that ask for structured output, as pydantic models."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from milora_jax.serving.api_errors import bad_request
from milora_jax.serving.limits import Limits
from milora_jax.serving.request_base import RequestBase
from milora_jax.serving.structured import (
    Grammar,
    choice_grammar,
    invalid_grammar,
    json_grammar,
    lark_grammar,
    regex_grammar,
    require_small,
)

Schema = dict[str, Any]
Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=4096)]
Text = Annotated[str, Field(min_length=1)]


class JSONSchema(RequestBase):
    """OpenAI's ``json_schema``. With ``strict`` false, keywords that are not implemented are ignored."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(RequestBase):
    """OpenAI's ``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None


class StructuredOutputs(RequestBase):
    """vLLM's ``structured_outputs``: exactly one of its fields."""

    json_: Annotated[Schema | Text | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None


class FormatFields(RequestBase):
    """The fields that ask for structured output, at most one in a request."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | Text | None = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None

    @property
    def wants_format(self) -> bool:
        """Whether a field asks for structured output."""
        wanted = [self.structured_outputs, self.guided_json, self.guided_regex, self.guided_choice]
        form = self.response_format
        return any(each is not None for each in (*wanted, self.guided_grammar)) or (
            form is not None and (form.type != "text" or form.json_schema is not None)
        )

    def format_grammar(self, limits: Limits) -> Grammar | None:
        """Return the requested grammar; this takes too long for the event loop.

        Raises:
          APIError: there are several, or it is invalid; naming the field.
        """
        asked: list[tuple[str, str, Any]] = [
            (kind, f"guided_{kind}", getattr(self, f"guided_{kind}"))
            for kind in ("json", "regex", "choice", "grammar")
        ]
        if (newer := self.structured_outputs) is not None:
            name = "structured_outputs"
            inner = [("json", newer.json_), ("object", newer.json_object or None), ("regex", newer.regex)]
            inner += [("choice", newer.choice), ("grammar", newer.grammar)]
            if all(value is None for _, value in inner):
                raise bad_request(f"{name}: expected one of json, regex, choice and grammar.", name)
            asked += [(kind, name, value) for kind, value in inner]
        if (form := self.response_format) is not None:
            schema = form.json_schema
            if (form.type == "json_schema") != (schema is not None):
                raise bad_request(
                    "response_format: json_schema goes with the type json_schema.", "response_format"
                )
            if form.type != "text":
                strict = None if schema is None else schema.strict
                value = (None if schema is None else schema.schema_, strict)
                asked.append(("format", "response_format", value))
        given = [each for each in asked if each[2] is not None]
        if len(given) > 1:
            names = " and ".join(dict.fromkeys(field for _, field, _ in given))
            raise bad_request(f"{names} ask for more than one format: expected one.", given[1][1])
        return grammar_of(*given[0], limits) if given else None


def grammar_of(kind: str, field: str, value: Any, limits: Limits) -> Grammar:
    """Return the grammar that a field asks for.

    Args:
      kind: ``json`` (a schema, or its text), ``object``, ``regex``, ``choice``, ``grammar``, or ``format``: a
        pair of a schema, None for any object, and OpenAI's ``strict``.
      field: its name, for errors.

    Raises:
      APIError: it is invalid; naming the field.
    """
    try:
        require_small(value if isinstance(value, str) else json.dumps(value), field, limits)
        if kind == "regex":
            return regex_grammar(value, field)
        if kind == "choice":
            return choice_grammar(value, field)
        if kind == "grammar":
            return lark_grammar(value, field)
        schema, strict = value if kind == "format" else (value, None)
        if isinstance(schema, str):
            schema = json.loads(schema)
            if not isinstance(schema, dict):
                raise invalid_grammar(field, "expected a JSON schema")
        if kind == "object" or schema is None:
            schema = {"type": "object"}
        return json_grammar(schema, field, lenient=strict is False)
    except (ValueError, RecursionError) as error:
        reason = f"it is no JSON, or nested too deeply ({type(error).__name__})"
        raise invalid_grammar(field, reason) from None
