"""Reads the JSON files of a server, whose fields are pydantic models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from milora_jax.base.json_files import read_json_object
from milora_jax.errors import UserError

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
Name = Annotated[str, Field(pattern=f"^{NAME}$")]
"""A name of a tenant or an adapter: a label in metrics, never a part of a path."""


class FileModel(BaseModel):
    """An object in a file: no type is coerced, no unknown field is accepted."""

    model_config = ConfigDict(extra="forbid", strict=True)


Read = TypeVar("Read", bound=FileModel)


def read_model(path: Path, model: type[Read]) -> Read:
    """Return the object in a file.

    Raises:
      UserError: naming the file, the field and what is expected there.
    """
    try:
        # As JSON again, because strict models take an object for a dataclass in JSON only.
        return model.model_validate_json(json.dumps(read_json_object(path)))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {field}: {first['msg']}") from None
