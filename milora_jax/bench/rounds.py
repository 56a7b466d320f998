"""What the benchmarks have in common: how they are asked, and how their variants take turns."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from milora_jax.config import QUANTIZE
from milora_jax.errors import require

Case = TypeVar("Case")


def numbers(text: str) -> list[int]:
    """Whole numbers, separated by commas."""
    return [int(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """Names, separated by commas."""
    return text.split(",")


def add_common(parser: argparse.ArgumentParser, peers: Sequence[str]) -> None:
    """Add the options that every benchmark has.

    Args:
      peers: values of ``--method`` that another Python runs.
    """
    parser.add_argument("--model", required=True, help="Hugging Face directory, or random:llama2-7b")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the base")
    parser.add_argument(
        "--quantize", type=names, default=["none"], help=f"how the base is kept: of {', '.join(QUANTIZE)}"
    )
    parser.add_argument("--repeats", type=int, default=7, help="at least 5; the median counts")
    parser.add_argument(
        "--peer-python",
        default=sys.executable,
        help=f"a Python with torch, transformers and peft, for {', '.join(peers)}; default: this one",
    )


def require_least(asked: argparse.Namespace, least: Mapping[str, int]) -> None:
    """Refuse a number, or one of several, that is too small.

    Args:
      least: by the name of the option.
    """
    for name, smallest in least.items():
        value = getattr(asked, name)
        for each in value if isinstance(value, list) else [value]:
            require(each >= smallest, f"--{name.replace('_', '-')}", each, f"at least {smallest}")


def require_names(option: str, values: Sequence[str], allowed: Sequence[str]) -> None:
    """Refuse a name that is none of those allowed."""
    for value in values:
        require(value in allowed, option, value, f"one of {', '.join(allowed)}")


def in_turns(
    cases: Sequence[Case], repeats: int, take: Callable[[Case], None], probe: Callable[[], float]
) -> float:
    """Take every case once a round, so that what disturbs the machine disturbs all alike.

    Every other round goes backwards, so that no case always follows the same one.

    Args:
      probe: what the machine can do, asked after every round.

    Returns:
      The median of the probes.
    """
    probes = []
    for repeat in range(repeats):
        for case in cases if repeat % 2 == 0 else cases[::-1]:
            take(case)
        probes.append(probe())
    return statistics.median(probes)
