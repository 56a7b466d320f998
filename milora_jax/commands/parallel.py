"""``python -m milora_jax.parallel aot ...``: check whether a config's programs fit chips that are not
attached."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from milora_jax.base.known import SHAPES
from milora_jax.commands.command_line import Parser, choose_command
from milora_jax.commands.config_options import read_config_file
from milora_jax.config import Config, parse_mesh
from milora_jax.errors import UserError, require
from milora_jax.model_config import ModelConfig
from milora_jax.scaling.aot import WHAT, Topology, describe
from milora_jax.scaling.plan import plan

PROGRAM = "python -m milora_jax.parallel"

COMMANDS = {"aot": "compile a config's programs for chips that are not attached, and report their memory"}


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the options; return them and the settings that replace the config's."""
    parser = Parser(
        allow_abbrev=False,
        prog=f"{PROGRAM} aot",
        description="Compile a config's programs for chips that are not attached, and report their memory.",
    )
    parser.add_argument("--config", required=True, help="a file such as configs/llama7b_math.py")
    parser.add_argument("--topology", required=True, help="such as v5e:2x4, v6e:4x4, tpu7x:2x2x1, h200:8")
    parser.add_argument("--mesh", default="", help="data=1,fsdp=16,expert=1,tensor=1; default: the config's")
    parser.add_argument("--model", default="", help=f"of {', '.join(SHAPES)}; default: config.model.path")
    parser.add_argument("--what", default="train", help=f"of {', '.join(WHAT)}")
    parser.add_argument("--prompts", type=int, default=1, help="records packed into a row, at most")
    parser.add_argument("--plan", action="store_true", help="search meshes and kinds of recomputation")
    parser.add_argument("--config.GROUP.FIELD", metavar="VALUE", help="as for train.py")
    return parser.parse_known_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile, and print the memory of each program."""
    given = sys.argv[1:] if arguments is None else arguments
    choose_command(PROGRAM, given, COMMANDS)
    asked, overrides = parse_arguments(given[1:])
    require(asked.prompts >= 1, "--prompts", asked.prompts, "at least 1")
    config = read_config_file(asked.config, overrides)
    if asked.mesh:
        of_eval = dataclasses.replace(config.eval, mesh=asked.mesh)
        config = dataclasses.replace(config, mesh=parse_mesh(asked.mesh), eval=of_eval)
    model = model_of(asked.model, config)
    topology = Topology(asked.topology)
    if asked.plan:
        require(asked.what == "train", "--plan", asked.what, "--what train")
        if not plan(topology, config, model, print):
            raise UserError(f"nothing fits {asked.topology}")
        return
    found = topology.compile(config, model, asked.what, asked.prompts)
    for line in describe(found, topology.chip):
        print(line)
    if not found.fits:
        raise UserError(f"{asked.what} does not fit {asked.topology}")


def model_of(name: str, config: Config) -> ModelConfig:
    """The shape to compile: by name, else from the directory of the config."""
    if name:
        require(name in SHAPES, "--model", name, f"one of {', '.join(SHAPES)}")
        return SHAPES[name]
    from milora_jax.base.hf_config import read_model_config
    from milora_jax.base.source import model_directory

    require(bool(config.model.path), "--model", name, f"one of {', '.join(SHAPES)}, or a config.model.path")
    return read_model_config(model_directory(config.model.path))
