"""The choice of modules that a LoRA or a DoRA changes, as PEFT's ``target_modules``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from milora_jax.adapters.inputs import ProjectionGroup
from milora_jax.adapters.low_rank import LowRankMethod
from milora_jax.errors import require
from milora_jax.shapes import Array, Float
from milora_jax.types import EXPERTS

ALL_LINEAR = "all-linear"
"""PEFT's word for every linear module of the layers, which are the seven."""

_MODULES = {f"{name}_proj": name for name in EXPERTS}
"""Our names of the modules by those of Hugging Face."""


def parse_targets(text: str) -> tuple[str, ...]:
    """The modules of ``adapter.target_modules``, in the order of ``types.EXPERTS``.

    >>> parse_targets("v_proj, q_proj")
    ('q', 'v')

    Raises:
      UserError: a name is none of a module, or there is none.
    """
    if text == ALL_LINEAR:
        return EXPERTS
    expected = f"{ALL_LINEAR}, or some of {','.join(_MODULES)}"
    names = [part.strip() for part in text.split(",")]
    require(all(name in _MODULES for name in names), "adapter.target_modules", text, expected)
    found = {_MODULES[name] for name in names}
    return tuple(module for module in EXPERTS if module in found)


def written_targets(modules: Iterable[str]) -> str:
    """The one way to write a choice of modules.

    >>> written_targets(("v", "q"))
    'q_proj,v_proj'
    """
    chosen = set(modules)
    names = [name for name, module in _MODULES.items() if module in chosen]
    return ALL_LINEAR if len(names) == len(EXPERTS) else ",".join(names)


@dataclass(frozen=True)
class TargetedMethod(LowRankMethod):
    """A method whose pairs may be on some of the seven modules only.

    Attributes:
      target_modules: the modules that have a pair: all-linear, all seven; or names as in PEFT, separated by
        commas, such as ``q_proj,v_proj``. The others stay as they are.
    """

    target_modules: str = ALL_LINEAR

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "target_modules", written_targets(parse_targets(self.target_modules)))

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that have a pair."""
        return parse_targets(self.target_modules)


def adapt_part(
    group: ProjectionGroup,
    modules: tuple[str, ...],
    adapt: Callable[[ProjectionGroup], tuple[Float[Array, "B T _"], ...]],
) -> tuple[Float[Array, "B T _"], ...]:
    """The outputs of a group of which only some modules are adapted; the others are the frozen ones.

    Args:
      modules: modules that are adapted, of any group.
      adapt: returns the adapted outputs of a group of such modules.
    """
    here = [i for i, name in enumerate(group.names) if name in modules]
    if len(here) == len(group.names):
        return adapt(group)
    if not here:
        return group.outputs
    part = dataclasses.replace(
        group,
        names=tuple(group.names[i] for i in here),
        outputs=tuple(group.outputs[i] for i in here),
        frozen=tuple(group.frozen[i] for i in here),
    )
    adapted = dict(zip(here, adapt(part), strict=True))
    return tuple(adapted.get(i, output) for i, output in enumerate(group.outputs))
