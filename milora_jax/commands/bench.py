"""``python -m milora_jax.bench decode|train|load|serve|overhead|files ...``: one JSON object per line."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence

from milora_jax.commands.command_line import choose_command
from milora_jax.commands.options import parse_settings

PROGRAM = "python -m milora_jax.bench"

BENCHMARKS = {
    "decode": "how fast prompts are continued",
    "train": "how fast an adapter is trained",
    "load": "how fast a base is read from a disk, beside the disk itself",
    "serve": "a running server under load, and what became of every request",
    "overhead": "what a server costs beside the engine that it runs",
    "files": "a random model of a known shape on the disk, and adapters for it",
}
"""Modules of ``milora_jax.bench`` with ``Settings``, and ``measure`` that gives one report after another."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark that the first argument names, and print its reports."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = choose_command(PROGRAM, given, BENCHMARKS)
    benchmark = importlib.import_module(f"milora_jax.bench.{name}")
    settings = parse_settings(benchmark.Settings, f"{PROGRAM} {name}", benchmark.__doc__, given[1:])
    for report in benchmark.measure(settings):
        print(json.dumps(report), flush=True)
