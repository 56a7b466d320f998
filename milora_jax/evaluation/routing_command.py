"""``python -m milora_jax.evaluation routing --workdir DIR --data FILE...``: which experts prompts choose.

Prompts are run once, nothing is generated. Prints a summary and writes, under ``--out``: ``shares.png``
(Figure 2 of the paper), ``decisions.png``, ``distances.png``, ``strips.png`` and ``routing.json``.
``--adapter DIR --base DIR`` looks at an exported adapter instead of a run. docs/routing.md explains all.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from milora_jax.cli import Console, Parser
from milora_jax.config import DTYPES, TEMPLATES
from milora_jax.data.records import Source, parse_given, read_records
from milora_jax.data.tokens import encode_question
from milora_jax.errors import UserError, require
from milora_jax.evaluation.routing import (
    Routes,
    TaskRouting,
    distances,
    letters_of,
    measure,
    require_router,
    route_prompts,
    summary_lines,
)
from milora_jax.evaluation.routing_plots import plot_decisions, plot_distances, plot_shares, plot_strips
from milora_jax.evaluation.score import limited
from milora_jax.evaluation.subject import Named, named_subject, read_subject
from milora_jax.storage.files import write_json_atomic
from milora_jax.types import EXPERTS

REPORT = "routing.json"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python -m milora_jax.evaluation routing",
        description=__doc__,
    )
    parser.add_argument("--workdir", type=Path, help="workdir of train.py: its base and its best adapter")
    parser.add_argument("--adapter", type=Path, help="exported adapter, or a workdir, beside --base")
    parser.add_argument("--base", help="Hugging Face directory, hf://OWNER/NAME, or gs://BUCKET/PATH")
    parser.add_argument("--dtype", choices=DTYPES, help="of the base; default: the run's, or float32")
    parser.add_argument("--template", choices=TEMPLATES, help="of prompts (default: the run's, or alpaca)")
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
    parser.add_argument("--out", type=Path, help="folder (default: WORKDIR/routing, or routing)")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Route, measure, draw, say."""
    arguments = parse_arguments(argv)
    require(arguments.limit >= 0, "--limit", arguments.limit, "0 or more")
    require(arguments.batch_size >= 1, "--batch-size", arguments.batch_size, "at least 1")
    named = named_subject(
        arguments.workdir,
        arguments.adapter,
        arguments.base,
        template=arguments.template,
        otherwise=TEMPLATES[0],
        dtype=arguments.dtype,
    )
    sources = parse_given(",".join(arguments.data), arguments.columns) or named.tests
    if not sources:
        raise UserError("there are no prompts to route: give --data FILE")
    out = arguments.out or (arguments.workdir or Path()) / "routing"
    routes = _route(named, sources, arguments.limit, arguments.batch_size)
    found = [measure(task, each) for task, each in routes.items()]
    table = distances(routes)
    write_report(out, routes, found)
    print("\n".join(summary_lines(found, table)))
    print(f"written to {out}")


def _route(named: Named, sources: Sequence[Source], limit: int, rows: int) -> dict[str, Routes]:
    """The routes of every task's prompts."""
    records = {source.name: limited(read_records(source, scored=True), limit) for source in sources}
    subject = read_subject(named)
    adapter = subject.adapter
    if adapter is None:
        raise UserError("a plain base has no routes: expected --workdir DIR, or --adapter DIR and --base DIR")
    require_router(adapter, named.adapter)
    prompts = {
        task: [encode_question(subject.tokenizer, record, subject.prompt_format) for record in mine]
        for task, mine in records.items()
    }
    console, model = Console(), subject.load()
    routes = {}
    for task, mine in prompts.items():
        with console.progress(f"routing {task}", len(mine), "prompts") as bar:
            try:
                routes[task] = route_prompts(
                    model.base, model.config, adapter, mine, rows=rows, progress=bar.advance
                )
            except UserError as error:
                raise UserError(f"{task}: {error}") from None
    return routes


def write_report(directory: Path, routes: dict[str, Routes], found: Sequence[TaskRouting]) -> None:
    """Write the pictures and ``routing.json``; each replaces an older one when all of them are drawn.

    Raises:
      UserError: the folder cannot be made or written; matplotlib is missing.
    """
    table, tasks = distances(routes), list(routes)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".drawing-", dir=directory) as folder:
            drawing = Path(folder)
            plot_shares(drawing / "shares.png", found)
            plot_decisions(drawing / "decisions.png", found)
            plot_strips(drawing / "strips.png", routes)
            plot_distances(drawing / "distances.png", tasks, table)
            for picture in drawing.iterdir():
                os.replace(picture, directory / picture.name)
    except ImportError:
        raise UserError("the pictures need the package matplotlib: pip install matplotlib") from None
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror or error}") from None
    report = {
        "experts": list(EXPERTS),
        "tasks": {each.task: each.to_json() for each in found},
        "distances": {"tasks": tasks, "bits": table.round(4).tolist()},
        "routes": {task: [letters_of(prompt) for prompt in each.weights] for task, each in routes.items()},
    }
    write_json_atomic(directory / REPORT, report)
