"""Fine-tune a frozen LLaMA-architecture model with MiLoRA.

    python train.py --config configs/tiny.py
    python train.py --config configs/llama7b_math.py --config.model.path=DIR --workdir runs/math
    python train.py --config configs/paper.py:lora,boolq --config.model.path=DIR

Any setting of the config can be given as ``--config.group.field=value``: ``--help`` lists them, and
``docs/configuration.md`` explains those of ``adapter`` for each method. The words after a colon are passed to
the config file. On a cluster run the same command on every host (docs/scaling.md).

Everything is written under the workdir; run the same command again to resume:

    config.json      the settings of the run
    metrics.jsonl    one line per logged step or dev evaluation
    checkpoints/     the newest states of training
    best/            the adapter with the lowest dev perplexity
    routing.png      which experts each layer chose, per task; routing_health.png: how the choice settled
    summary.json     accuracy, loss and measures of free text before and after, parameters, speed
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from milora_jax.commands.startup import begin

if __name__ == "__main__":
    begin()

import milora_jax
from milora_jax.cluster import Cluster
from milora_jax.commands.command_line import Parser, run_command
from milora_jax.commands.config_options import read_config_file, settings_parser, todays_spelling
from milora_jax.commands.options import add_options, settings_of
from milora_jax.config import Config
from milora_jax.errors import UserError


class Arguments(NamedTuple):
    """The values of the command line."""

    config: Config
    workdir: Path
    cluster: Cluster


def parse_arguments(arguments: Sequence[str] | None = None) -> Arguments:
    """Read the options, the config file, and the settings that replace its own."""
    parser = Parser(
        allow_abbrev=False,
        usage="python train.py --config FILE[:WORDS] [--config.GROUP.FIELD=VALUE ...] [--workdir DIR]",
        description=__doc__,
        epilog=settings_parser().format_help(),
    )
    about = "a file of settings, and after a colon words for it"
    parser.add_argument("--config", metavar="FILE", action="append", default=[], help=about)
    about = "folder of the run, or gs://BUCKET/PATH (default: runs/ and the name of the config file)"
    parser.add_argument("--workdir", metavar="DIR", default="", help=about)
    add_options(parser, Cluster)
    given = sys.argv[1:] if arguments is None else arguments
    asked, overrides = parser.parse_known_args(todays_spelling(given))
    if not asked.config:
        raise UserError("--config is missing, expected for example --config configs/tiny.py")
    if len(asked.config) > 1:
        raise UserError(f"--config is given {len(asked.config)} times, expected once")
    path, _, words = asked.config[0].partition(":")
    named_after = "-".join([Path(path).stem, *filter(None, words.split(","))])
    return Arguments(
        config=read_config_file(asked.config[0], overrides),
        workdir=Path(asked.workdir or Path("runs") / named_after),
        cluster=settings_of(Cluster, asked),
    )


def main() -> None:
    """Prepare, score the base, train, score the best adapter, report: see ``milora_jax.run``."""
    config, workdir, cluster = parse_arguments()
    milora_jax.train(config, workdir, cluster=cluster, handle_signals=True)


if __name__ == "__main__":
    run_command(main)
