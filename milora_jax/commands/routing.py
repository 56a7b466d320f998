"""``python -m milora_jax.evaluation routing --workdir DIR --data FILE...``: the experts that prompts choose.

Prompts are run once and nothing is generated. The command prints a summary and writes, under ``--out``,
``shares.png`` (Figure 2 of the paper), ``decisions.png``, ``distances.png``, ``strips.png`` and
``routing.json``. ``--adapter DIR --base DIR`` reads an exported adapter instead of a run. docs/routing.md
explains them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from milora_jax.addresses import local_path
from milora_jax.cluster import Cluster
from milora_jax.commands.command_line import Parser
from milora_jax.commands.options import add_mesh_options, settings_of
from milora_jax.config import DTYPES
from milora_jax.data.sources import parse_given
from milora_jax.errors import UserError, as_given, require
from milora_jax.evaluation.routing import Routes, distances, measure, route_tasks, summary_lines
from milora_jax.evaluation.routing_plots import write_report
from milora_jax.evaluation.subject import named_subject
from milora_jax.parallel.processes import is_first, together
from milora_jax.prompt_format import TEMPLATES
from milora_jax.storage.mirror import local_copy, synced


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the options."""
    parser = Parser(
        prog="python -m milora_jax.evaluation routing",
        description=__doc__,
    )
    parser.add_argument("--workdir", type=local_copy, help="workdir of train.py, or its gs:// address")
    parser.add_argument("--adapter", type=local_copy, help="exported adapter, or a workdir, beside --base")
    parser.add_argument("--base", help="Hugging Face directory, hf://OWNER/NAME, or gs://BUCKET/PATH")
    parser.add_argument("--dtype", choices=DTYPES, help="of the base; default: the run's, or float32")
    parser.add_argument(
        "--template",
        choices=TEMPLATES,
        help="of prompts (default: the run's or the export's, else alpaca)",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="[NAME=]FILE",
        help="records, one task per file (default: the run's test files)",
    )
    parser.add_argument(
        "--columns", default="", help="[NAME:]FIELD=COLUMN,... of the rows of --data, see docs/data.md"
    )
    parser.add_argument("--limit", type=int, default=0, help="prompts per task (default: all)")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts run together")
    parser.add_argument("--out", type=local_path, help="folder (default: WORKDIR/routing, or routing)")
    add_mesh_options(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Compute routes and statistics, draw the figures, and print the summary."""
    asked = parse_arguments(arguments)
    require(asked.limit >= 0, "--limit", asked.limit, "0 or more")
    require(asked.batch_size >= 1, "--batch-size", asked.batch_size, "at least 1")
    named = named_subject(
        asked.workdir,
        asked.adapter,
        asked.base,
        template=asked.template,
        otherwise=TEMPLATES[0],
        dtype=asked.dtype,
    )
    sources = parse_given(",".join(asked.data), asked.columns) or named.tests
    if not sources:
        raise UserError("there are no prompts to route: give --data FILE")
    out = asked.out or (asked.workdir or Path()) / "routing"
    with together(settings_of(Cluster, asked)):
        routes = route_tasks(named, sources, asked.limit, asked.batch_size, asked.mesh)
        if is_first():
            with synced(asked.workdir):
                _report(routes, out)


def _report(routes: dict[str, Routes], out: Path) -> None:
    found = [measure(task, each) for task, each in routes.items()]
    table = distances(routes)
    write_report(out, routes, found)
    print("\n".join(summary_lines(found, table)))
    print(f"written to {as_given(out)}")
