"""Export, import and push adapters, and check files byte by byte.

python -m milora_jax.storage export --workdir DIR --out DIR --format milora|peft|static|orbax|merged
python -m milora_jax.storage import --peft DIR --base DIR --out DIR
python -m milora_jax.storage verify PATH    # a workdir, its checkpoints/ or best/, one step, an export
python -m milora_jax.storage push ADAPTER hf://OWNER/NAME [--private]

docs/adapters.md says which program reads which format.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from milora_jax.adapters.registry import METHODS
from milora_jax.base.hf_config import read_model_config
from milora_jax.base.load import load_base
from milora_jax.base.source import hub_name, model_directory
from milora_jax.commands.command_line import Parser, interrupt_on_termination
from milora_jax.commands.push import add_push, push
from milora_jax.config import DataSection
from milora_jax.console import Console
from milora_jax.data.records import Record, read_records
from milora_jax.data.sources import Source, run_sources
from milora_jax.data.tokens import load_tokenizer
from milora_jax.errors import UserError, as_given, printable, require
from milora_jax.evaluation.score import limited
from milora_jax.evaluation.static_route import Model, calibrated_route, report_json, static_report
from milora_jax.prompt_format import TEMPLATES, PromptFormat, stored_prompt_format
from milora_jax.storage import export
from milora_jax.storage.adapters import best_metadata, read_adapter, require_its_base
from milora_jax.storage.files import require_new
from milora_jax.storage.imported import import_peft
from milora_jax.storage.merged import SHARD_BYTES
from milora_jax.storage.mirror import local_copy, with_states
from milora_jax.storage.peft import require_unfused
from milora_jax.storage.verify import findings
from milora_jax.storage.workdir import CONFIG_NAME, prompt_format_of, read_workdir_config

FORMATS = ("milora", "peft", "static", "orbax", "merged")
FOR_OTHERS = ("peft", "static", "merged")
"""Formats for other programs, which need the base."""

ONLY_OF = {
    "calibration": ("static", "merged"),
    "dev": ("static", "merged"),
    "columns": ("static", "merged"),
    "limit": ("static", "merged"),
    "base_name": ("peft", "static"),
}
"""Options that other formats would ignore."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options."""
    parser = Parser(prog="python -m milora_jax.storage")
    commands = parser.add_subparsers(dest="command", required=True)
    writer = commands.add_parser("export", help="write the best adapter of a run for other programs")
    writer.add_argument("--workdir", required=True, type=local_copy, help="workdir of train.py, or an export")
    writer.add_argument("--out", required=True, type=Path, help="a new or an empty directory")
    writer.add_argument("--format", required=True, choices=FORMATS, help="see docs/adapters.md")
    writer.add_argument("--base", help="of the base (default: the run's): directory, hf:// name or gs://")
    writer.add_argument(
        "--base-name", default="", help="its name in PEFT's files (default: its path or hf:// name)"
    )
    writer.add_argument("--calibration", default="", help="files whose prompts fix the route of a MiLoRA")
    writer.add_argument("--dev", default="", help="files that measure it (default: the same)")
    writer.add_argument("--columns", default="", help="[NAME:]FIELD=COLUMN,... of both, see docs/data.md")
    writer.add_argument("--template", choices=TEMPLATES, help="of them (default: the adapter's, or alpaca)")
    writer.add_argument("--limit", type=int, default=0, help="rows of each kind (default: all)")
    writer.add_argument("--max-new-tokens", type=int, default=64, help="longest greedy answer compared")
    writer.add_argument("--batch-size", type=int, default=8, help="rows computed together")
    writer.add_argument("--dtype", default="float32", help="in which the base is computed for a static route")
    writer.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, help="largest file of merged weights")
    reader = commands.add_parser("import", help="make an adapter of what PEFT saved")
    reader.add_argument("--peft", required=True, type=local_copy, help="directory with adapter_config.json")
    reader.add_argument("--base", required=True, help="its base: directory, hf:// name or gs://")
    reader.add_argument("--out", required=True, type=Path, help="a new or an empty directory")
    reader.add_argument("--method", default="", choices=METHODS, help="milora or midora: as experts")
    reader.add_argument("--seed", type=int, default=0, help="of what is fresh in it")
    checker = commands.add_parser("verify", help="check names, shapes, dtypes, values and hashes")
    checker.add_argument("path", type=with_states)
    checker.add_argument("--base", help="that it must be for: directory, hf:// name or gs://")
    add_push(commands.add_parser("push", help="upload an adapter to the Hugging Face Hub"))
    return parser.parse_args(arguments)


def verify(path: Path, base: Path | None) -> None:
    """Print one line per finding, or one line without findings; raise an error if there are any."""
    found = findings(path, base)
    for folder, lines in found.items():
        for line in lines or ["ok"]:
            print(printable(as_given(f"{folder}  {line}")))
    wrong = sum(bool(lines) for lines in found.values())
    if wrong:
        kind = "adapters" if path in found else "steps"
        raise UserError(f"{wrong} of {len(found)} {kind} of {str(path)!r} are damaged or do not fit")


def run_export(asked: argparse.Namespace) -> None:
    """Write the adapter in the requested format."""
    source, out, kind = asked.workdir, asked.out, asked.format
    require_new(out)  # before the calibration, which takes a while
    for name in ("limit", "batch_size", "max_new_tokens", "shard_bytes"):
        least = 0 if name == "limit" else 1
        require(getattr(asked, name) >= least, name, getattr(asked, name), f"at least {least}")
    for name, formats in ONLY_OF.items():
        if getattr(asked, name) and kind not in formats:
            raise UserError(f"--{name.replace('_', '-')} is of format {' or '.join(formats)}, not {kind}")
    if kind == "static" and not asked.calibration:
        raise UserError("format static fixes the route of a MiLoRA: give --calibration FILE")
    metadata = best_metadata(source)
    if kind == "static":
        method = metadata["adapter"].get("method")
        require(method == "milora", "the method", method, "milora, for format static")
    if asked.base is not None or kind in FOR_OTHERS:
        require_its_base(metadata, source, base_of(asked))
    if kind in ("peft", "static"):
        require_unfused(read_model_config(base_of(asked)), base_of(asked))
    if kind == "milora":
        export.export_milora(source, out)
    elif kind == "orbax":
        export.export_orbax(source, out)
    elif kind == "peft":
        export.export_peft(source, out, asked.base_name or name_of_base(asked))
    else:
        weights, origin = fixed_route(asked)
        if kind == "merged":
            export.export_merged(source, base_of(asked), out, weights, origin, asked.shard_bytes)
        elif weights is not None:
            name = asked.base_name or name_of_base(asked)
            export.export_static(source, out, name, weights, origin)
    stored = stored_prompt_format(metadata.get("prompt_format"), str(source))
    if kind in FOR_OTHERS and (note := note_on_prompts(prompt_format_of(source, stored))):
        Console().log(note)
    print(f"written to {out}")


def note_on_prompts(written: PromptFormat) -> str:
    """A note for users of other programs about the adapter's prompts; "" where they need none.

    Those programs encode a text by ``tokenizer(text)``, and store no format beside an adapter. A chat has the
    same tokens there as here, because its template decides about special tokens.
    """
    if written.special_tokens == "tokenizer" or written.template == "chat":
        return ""
    begun = written.special_tokens == "bos"
    what = "one beginning-of-sequence token before" if begun else "no special token around"
    return f"note: the adapter was trained with {what} every prompt: give its readers such prompts"


def fixed_route(asked: argparse.Namespace) -> tuple[np.ndarray | None, dict[str, Any]]:
    """The modal route of the calibration rows and its cost; None without such rows."""
    if not asked.calibration:
        return None, {}
    rows = DataSection(train=asked.calibration, dev=asked.dev, columns=asked.columns)
    sources = run_sources(rows)
    calibration = _records(sources["train"], asked.limit)
    dev = _records(sources["dev"], asked.limit) if sources["dev"] else calibration
    (adapter, metadata), folder = read_adapter(asked.workdir), base_of(asked)
    if not adapter.method.routes:
        raise UserError(f"method {adapter.method.name!r} has no router: expected no --calibration")
    quantize = require_its_base(metadata, asked.workdir, folder)
    console = Console()
    with console.loading("base") as progress:
        base, config = load_base(folder, asked.dtype, decode=True, quantize=quantize, progress=progress)
    require(bool(config.eos_ids), "eos_token_id of the model", None, "a token that ends an answer")
    longest, most = min(DataSection().max_length, config.max_positions), asked.max_new_tokens
    require(most < longest, "--max-new-tokens", most, f"below {longest}, which prompt and answer share")
    known = prompt_format_of(asked.workdir, adapter.prompt_format)
    template = asked.template or known.template or TEMPLATES[0]
    written = dataclasses.replace(known, template=template)
    model = Model(base, config, load_tokenizer(str(folder)), written, asked.batch_size)
    route = calibrated_route(model, adapter, calibration, console.log)
    print("\n".join(route.lines()))
    report = None
    if adapter.method.name == "milora":
        report = static_report(model, adapter, route, dev, longest, asked.max_new_tokens, console.log)
        print(report.line())
    return route.weights, {"static": report_json(route, report)}


def base_of(asked: argparse.Namespace) -> Path:
    """The directory of the base."""
    return model_directory(path_of_base(asked))


def path_of_base(asked: argparse.Namespace) -> str:
    """The path of the base: the given one, or the run's."""
    if asked.base is not None:
        return asked.base
    if not (asked.workdir / CONFIG_NAME).is_file():
        raise UserError(f"{str(asked.workdir)!r} is no workdir that names its base: give --base")
    return read_workdir_config(asked.workdir).model.path


def name_of_base(asked: argparse.Namespace) -> str:
    """The name of the base in other programs: its path, or its name on the Hub."""
    return hub_name(path_of_base(asked))


def _records(sources: Sequence[Source], limit: int) -> list[Record]:
    return limited([record for source in sources for record in read_records(source)], limit)


def main(arguments: Sequence[str] | None = None) -> None:
    """Export, import, verify or push."""
    asked = parse_arguments(arguments)
    with interrupt_on_termination():
        if asked.command == "verify":
            verify(asked.path, None if asked.base is None else model_directory(asked.base))
        elif asked.command == "export":
            run_export(asked)
        elif asked.command == "push":
            push(asked, Console().log)
        else:
            source, base, out = asked.peft, model_directory(asked.base), asked.out
            for line in import_peft(source, base, out, asked.method, asked.seed):
                Console().log(line)
            print(f"written to {out}")
