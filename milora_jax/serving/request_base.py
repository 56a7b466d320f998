"""Building blocks of the models of request bodies: types of fields, strictness, errors that name a field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import PydanticCustomError

from milora_jax.base.json_files import parse_json_object
from milora_jax.data.chat import UNWRITABLE
from milora_jax.errors import UserError
from milora_jax.serving.api_errors import APIError, bad_request
from milora_jax.serving.unsupported import UNSUPPORTED, Unsupported, describe, without_unsupported

Number = Annotated[float, Field(allow_inf_nan=False)]


class _HashableFailFast(FailFast):
    """pydantic's ``FailFast`` is not hashable, and members of a union must be."""

    def __hash__(self) -> int:
        return id(self)


FAIL_FAST = _HashableFailFast()
"""Ends the validation of a list at its first invalid entry: a body may hold a megabyte of them."""

BOUNDED = Field(max_length=4096)
"""A list whose own limit, a smaller one, is in ``serving.limits``."""

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]

TokenIds = Annotated[list[TokenId], Field(min_length=1), FAIL_FAST]

CONTRADICTION = "contradiction"
"""Type of the validation error of a field that another one forbids; its context has ``field``."""

Ignored = Annotated[str, Field(max_length=256)] | None
"""A name of a client or a conversation, which has no effect on the response."""


class RequestBase(BaseModel):
    """A body, or an object in one: no type is coerced, no unknown field is accepted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    unsupported: ClassVar[Unsupported] = {}
    """Fields that are known and not supported."""

    @model_validator(mode="before")
    @classmethod
    def _drop_unsupported(cls, values: Any) -> Any:
        return without_unsupported(values, cls.unsupported) if isinstance(values, dict) else values

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core)
        describe(handler.resolve_ref_schema(schema), cls.unsupported)
        return schema


def contradiction(field: str, message: str) -> PydanticCustomError:
    """Return the error of a field whose value another field forbids."""
    return PydanticCustomError(CONTRADICTION, "{message}", {"field": field, "message": message})


def parse_body(content: bytes) -> dict[str, Any]:
    """Return the JSON object of a body, whatever its fields.

    Raises:
      APIError: it is none, or has a name twice or a character that no tokenizer can take.
    """
    try:
        values = parse_json_object(content, "The body")
    except UserError:
        raise bad_request("The body is not a JSON object without doubled names.") from None
    pending: list[Any] = [values]
    while pending:
        value = pending.pop()
        if isinstance(value, str) and UNWRITABLE.search(value):
            raise bad_request("The body holds a lone surrogate or a NUL character.")
        if isinstance(value, dict):
            pending += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            pending += value
    return values


def invalid_request(errors: Sequence[Mapping[str, Any]]) -> APIError:
    """Return the error for a body that a model does not accept, naming the field.

    Args:
      errors: as :meth:`pydantic.ValidationError.errors` has them.
    """
    # Of a union's errors, the one that says most.
    told = (UNSUPPORTED, CONTRADICTION)
    first = next((error for error in errors if error["type"] in told), errors[0])
    location = first["loc"]
    field = str(location[0])[:80] if location else ""
    if first["type"] == "extra_forbidden":
        unknown = str(location[-1])[:80]
        return bad_request(f"Unrecognized request argument supplied: {unknown!r}.", unknown)
    if first["type"] == CONTRADICTION:
        return bad_request(f"{first['msg']}.", first["ctx"]["field"])
    if first["type"] == UNSUPPORTED:
        name = ".".join(part for part in (field, first["ctx"]["field"]) if part)
        return bad_request(f"{first['msg']}.", name, "unsupported_parameter")
    return bad_request(f"{field}: {first['msg']}.", field or None)
