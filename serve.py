"""Serve adapters on one frozen base, as OpenAI's API.

    python serve.py --base DIR --adapter math=runs/math --adapter law=runs/law --port 8000
    python serve.py --demo

docs/serving.md has the endpoints, the keys and the limits.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from milora_jax.commands.startup import begin

if __name__ == "__main__":
    begin()

from milora_jax.addresses import local_path
from milora_jax.commands.command_line import Parser, run_command
from milora_jax.commands.options import add_options, settings_of
from milora_jax.config import DTYPES, QUANTIZE
from milora_jax.console import Console
from milora_jax.errors import UserError, named_directory
from milora_jax.serving.build import Offer, build_service
from milora_jax.serving.demo import demo_adapters
from milora_jax.serving.keys import Keyring
from milora_jax.serving.limits import Limits
from milora_jax.serving.registry import Registered, Registry
from milora_jax.serving.server import bound_socket, serve
from milora_jax.tiny import MODEL_DIR


def parse_arguments() -> argparse.Namespace:
    """Read the options."""
    parser = Parser(prog="serve.py", description=__doc__)
    add = parser.add_argument
    add("--demo", action="store_true", help="the embedded model with two adapters, trained first")
    add("--base", default="", help="Hugging Face directory, hf://OWNER/NAME, or gs://BUCKET/PATH")
    add("--name", default="base", help="under which the base alone is offered")
    add(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="to load, also NAME=hf://OWNER/NAME; may be repeated",
    )
    add("--pin", action="append", default=[], metavar="NAME", help="an adapter that stays on the device")
    add("--registry", type=local_path, help="file that keeps adapters' names and what is loaded")
    add("--keys", type=local_path, help="file of tenants' keys, see docs/serving.md")
    add("--host", default="127.0.0.1", help="address to listen to")
    add("--port", type=int, default=8000, help="0 takes any that is free")
    add("--dtype", default="float32", choices=DTYPES, help="of the base")
    add("--quantize", default="none", choices=QUANTIZE, help="how the base is kept")
    add("--tensor", type=int, default=1, help="devices that share the work of every layer")
    add_options(parser, Limits)
    return parser.parse_args()


def main() -> None:
    """Load, compile, serve."""
    asked = parse_arguments()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(message)s")
    limits = settings_of(Limits, asked)
    keys = Keyring.of(asked.keys)
    given = dict(named_directory("--adapter", each) for each in asked.adapter)
    if not asked.base and not asked.demo:
        raise UserError("--base is missing: expected a model, or --demo")
    with bound_socket(keys, asked.host, asked.port) as bound:
        base = asked.base
        if asked.demo:
            base, given = str(MODEL_DIR), {**demo_adapters(Path("runs")), **given}
        unknown = sorted(set(asked.pin) - given.keys())
        if unknown:
            raise UserError(f"--pin {unknown[0]!r}: expected the name of an --adapter")
        registered = {name: Registered(path, pinned=name in asked.pin) for name, path in given.items()}
        registry = Registry(asked.registry, registered)
        offer = Offer(base, asked.name, asked.dtype, asked.quantize, asked.tensor)
        console = Console()
        with console.loading("base") as progress:
            service = build_service(offer, registry, limits, progress, console.log)
        raise SystemExit(serve(service, keys, registry, bound))


if __name__ == "__main__":
    run_command(main)
