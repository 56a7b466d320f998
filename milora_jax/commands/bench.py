"""``python -m milora_jax.bench COMMAND``: one JSON object per line, see ``BENCHMARKS``."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence

from milora_jax.commands.command_line import choose_command, interrupt_on_termination
from milora_jax.commands.options import parse_settings

PROGRAM = "python -m milora_jax.bench"

BENCHMARKS = {
    "decode": "the speed of decoding",
    "train": "the speed of training",
    "rows": "what many training rows cost before the first step and in every step",
    "startup": "how long a command takes to its first result, cold and warm",
    "prefill": "what long prompts cost others, and what a prefix cache saves",
    "lookup": "what speculation by prompt look-up saves",
    "load": "the speed of loading a base, compared with the disk itself",
    "serve": "a running server under load, and the outcome of every request",
    "overhead": "the cost of a server compared with its engine",
    "device": "what a new accelerator should tell, in a given number of minutes",
    "files": "a random model of a known shape, and adapters for it",
}
"""Modules of ``milora_jax.bench`` with ``Settings``, and ``measure``, which yields reports, or text."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark that the first argument names, and print its reports."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = choose_command(PROGRAM, given, BENCHMARKS)
    benchmark = importlib.import_module(f"milora_jax.bench.{name}")
    settings = parse_settings(benchmark.Settings, f"{PROGRAM} {name}", benchmark.__doc__, given[1:])
    with interrupt_on_termination():  # so that processes that a benchmark has started end with it
        for report in benchmark.measure(settings):
            print(report if isinstance(report, str) else json.dumps(report), flush=True)
