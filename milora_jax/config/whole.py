"""All settings of a run together, and their conversion from and to nested mappings."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from milora_jax.config.adapter import AdapterSection
from milora_jax.config.data import DataSection
from milora_jax.config.evaluation import EvalSection
from milora_jax.config.mesh import MeshSection
from milora_jax.config.model import ModelSection
from milora_jax.config.train import TrainSection
from milora_jax.errors import UserError, require
from milora_jax.prompt_format import PromptFormat


@dataclass(frozen=True)
class Config:
    """All settings of a run, as ``config.json`` in the workdir holds them."""

    model: ModelSection = field(default_factory=ModelSection)
    adapter: AdapterSection = field(default_factory=AdapterSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    mesh: MeshSection = field(default_factory=MeshSection)
    eval: EvalSection = field(default_factory=EvalSection)

    @classmethod
    def from_dict(cls, values: Any) -> Config:
        """Build and check a Config from nested mappings; an unknown or ill-typed field raises UserError."""
        return _from_dict(cls, values, "config")

    @property
    def prompt_format(self) -> PromptFormat:
        """How the prompts of the run are written, and what of them the routers read.

        Raises:
          UserError: ``adapter.route_on`` does not go together with ``data.template``.
        """
        return dataclasses.replace(self.data.prompt_format, route_on=self.adapter.route_on or "prompt")

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain nested dictionaries, ready for JSON."""
        return dataclasses.asdict(self)


def to_config_dict(config: Config) -> Any:
    """Convert to the ``ml_collections.ConfigDict`` that a file in ``configs/`` returns."""
    from ml_collections import ConfigDict  # only config files need it

    return ConfigDict(config.to_dict())


def value_type(kind: Any) -> Any:
    """``int`` of ``int | None``; any other type as it is."""
    inner = [arm for arm in typing.get_args(kind) if arm is not type(None)]
    return inner[0] if isinstance(kind, types.UnionType) else kind


def _from_dict(cls: Any, values: Any, where: str) -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    for name in values:
        near = difflib.get_close_matches(str(name), sorted(known), n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else f" (known: {', '.join(sorted(known))})"
        if name not in known:
            raise UserError(f"unknown setting {where}.{name}{hint}")
    hints = typing.get_type_hints(cls)
    parsed = {}
    for name in known & set(values):
        value, kind = values[name], value_type(hints[name])
        label = f"{where}.{name}"
        if value is None and isinstance(hints[name], types.UnionType):
            parsed[name] = None
        elif dataclasses.is_dataclass(kind):
            parsed[name] = _from_dict(kind, value, label)
        elif kind is float and isinstance(value, int) and not isinstance(value, bool):
            try:
                parsed[name] = float(value)
            except OverflowError:
                raise UserError(f"{label} has {len(str(value))} digits: expected a number") from None
        else:
            require(type(value) is kind, label, value, f"a value of type {kind.__name__}")
            parsed[name] = value
    return cls(**parsed)
