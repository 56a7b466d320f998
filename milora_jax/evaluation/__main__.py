"""``python -m milora_jax.evaluation --workdir DIR --data FILE``: accuracy as JSON, predictions as JSONL.

``python -m milora_jax.evaluation study NAME --config FILE`` compares methods, see ``evaluation.study``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from milora_jax.base.load import load_base
from milora_jax.base.source import model_directory
from milora_jax.base.transformer import adapter_decode_layout
from milora_jax.cli import Console, Parser
from milora_jax.config import EvalSection
from milora_jax.data.records import parse_sources, read_records
from milora_jax.data.tokens import load_tokenizer
from milora_jax.errors import UserError, run_command
from milora_jax.evaluation.score import accuracies, limited, score_task, write_predictions
from milora_jax.evaluation.study.command import main as study_main
from milora_jax.storage.adapters import read_adapter, require_its_base
from milora_jax.storage.workdir import read_workdir_config


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="python -m milora_jax.evaluation", description=__doc__)
    parser.add_argument("--workdir", required=True, type=Path, help="workdir of train.py")
    parser.add_argument(
        "--data", default="", help="files to score, comma-separated (default: the run's test files)"
    )
    parser.add_argument("--task", default="", help="name of the extraction rule's task, for a single file")
    parser.add_argument("--limit", type=int, default=0, help="rows scored per task (default: all)")
    parser.add_argument(
        "--batch-size", type=int, default=0, help="prompts decoded together (default: the run's)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=0, help="longest answer (default: the run's)")
    parser.add_argument("--base", action="store_true", help="score the frozen base without the adapter")
    parser.add_argument("--predictions", type=Path, help="JSONL file (default: WORKDIR/evaluation.jsonl)")
    return parser.parse_args()


def main() -> None:
    """Score the best adapter of a workdir on records; or, given ``study``, compare methods."""
    if sys.argv[1:2] == ["study"]:
        study_main(sys.argv[2:])
        return
    arguments = parse_arguments()
    config = read_workdir_config(arguments.workdir)
    sources = parse_sources(arguments.data or config.data.test)
    if not sources:
        raise UserError("nothing to score: give --data FILE, the run has no data.test")
    if arguments.task and len(sources) != 1:
        raise UserError(f"--task {arguments.task!r} names one task, --data has {len(sources)} files")
    if arguments.task:
        sources = [dataclasses.replace(sources[0], name=arguments.task)]
    settings = EvalSection(
        limit=arguments.limit,
        batch_size=arguments.batch_size or config.eval.batch_size,
        max_new_tokens=arguments.max_new_tokens or config.eval.max_new_tokens,
    )
    tasks = {source.name: read_records(source, scored=True) for source in sources}
    predictions = arguments.predictions or arguments.workdir / "evaluation.jsonl"
    if not predictions.parent.is_dir():
        raise UserError(
            f"--predictions {str(predictions)!r}: no such directory as {str(predictions.parent)!r}"
        )
    adapter, directory = None, model_directory(config.model.path)
    if not arguments.base:
        adapter, metadata = read_adapter(arguments.workdir)
        require_its_base(metadata, arguments.workdir, directory)
    dtype, quantize = config.model.dtype, config.model.quantize
    with Console().loading("base") as progress:
        base, model = load_base(directory, dtype, decode=True, quantize=quantize, progress=progress)
    tokenizer = load_tokenizer(str(directory))
    adapter = None if adapter is None else adapter_decode_layout(adapter, base)
    scores = []
    for task, records in tasks.items():
        print(f"scoring {task} ({len(limited(records, settings.limit))} rows)", file=sys.stderr, flush=True)
        template = config.data.template
        scores.append(score_task(base, model, tokenizer, adapter, task, records, settings, template=template))
    rows = {score.task: len(score.predictions) for score in scores}
    print(json.dumps({"accuracy": accuracies(scores), "rows": rows}))
    write_predictions(predictions, scores)


if __name__ == "__main__":
    run_command(main)
