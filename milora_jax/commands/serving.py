"""``python -m milora_jax.serving hash-key``: hash a key on standard input for a file of keys."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from milora_jax.commands.command_line import Parser
from milora_jax.serving.keys import digest_of


def main(arguments: Sequence[str] | None = None) -> None:
    """Read a key and print its digest."""
    parser = Parser(prog="python -m milora_jax.serving", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("hash-key", help="print the SHA-256 of the key on standard input")
    parser.parse_args(arguments)
    print(digest_of(sys.stdin.readline().rstrip("\n")))
