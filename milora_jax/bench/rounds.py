"""The common part of the benchmarks: their options, and the turns of their variants."""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from milora_jax.config import QUANTIZE
from milora_jax.errors import require

Case = TypeVar("Case")


def option(
    default: Any = dataclasses.MISSING, *, least: int | None = None, choices: Collection[str] = ()
) -> Any:
    """A field of a benchmark's settings; ``least`` and ``choices`` bound its value, or each of several."""
    return dataclasses.field(default=default, metadata={"least": least, "choices": choices})


@dataclass(frozen=True)
class BenchSettings:
    """Settings whose fields are checked by their :func:`option`."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, name = getattr(self, field.name), f"--{field.name.replace('_', '-')}"
            least, choices = field.metadata.get("least"), field.metadata.get("choices")
            for each in value if isinstance(value, tuple) else (value,):
                if least is not None:
                    require(each >= least, name, each, f"at least {least}")
                if choices:
                    require(each in choices, name, each, f"one of {', '.join(choices)}")


@dataclass(frozen=True)
class ModelSettings(BenchSettings):
    """The measured model, and the Python of the peers.

    Attributes:
      model: Hugging Face directory, or random:llama2-7b.
      dtype: dtype of the base.
      quantize: quantisation of the base.
      repeats: at least 5; the median counts.
      peer_python: a Python with torch, transformers and peft, for its methods; default: this one.
    """

    model: str
    dtype: str = option("float32", choices=("float32", "bfloat16"))
    quantize: tuple[str, ...] = option(("none",), choices=QUANTIZE)
    repeats: int = option(7, least=1)
    peer_python: str = sys.executable


def in_turns(
    cases: Sequence[Case], repeats: int, take: Callable[[Case], None], probe: Callable[[], float]
) -> float:
    """Run every case once a round, so that disturbances of the machine affect all alike.

    Every other round runs backwards, so that no case always follows the same one.

    Args:
      probe: measures what the machine can do, after every round.

    Returns:
      The median of the probes.
    """
    probes = []
    for repeat in range(repeats):
        for case in cases if repeat % 2 == 0 else cases[::-1]:
            take(case)
        probes.append(probe())
    return statistics.median(probes)
