"""Adapters out of a run and into one, and what lies on the disk checked byte by byte.

python -m milora_jax.storage export --workdir DIR --out DIR --format milora|peft|orbax
python -m milora_jax.storage verify PATH    # a workdir, its checkpoints/ or best/, one step, an export
"""

from __future__ import annotations

import argparse
from pathlib import Path

from milora_jax.errors import UserError, run_command
from milora_jax.storage import export
from milora_jax.storage.adapters import require_its_base
from milora_jax.storage.verify import findings
from milora_jax.storage.workdir import CONFIG_NAME, read_workdir_config

FORMATS = ("milora", "peft", "orbax")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m milora_jax.storage")
    commands = parser.add_subparsers(dest="command", required=True)
    writer = commands.add_parser("export", help="write the best adapter of a run for other programs")
    writer.add_argument(
        "--workdir", required=True, type=Path, help="workdir of train.py, or an exported adapter"
    )
    writer.add_argument("--out", required=True, type=Path, help="a new or an empty directory")
    writer.add_argument("--format", required=True, choices=FORMATS, help="see docs/adapters.md")
    writer.add_argument("--base", type=Path, help="Hugging Face directory of the base (default: the run's)")
    writer.add_argument(
        "--base-name", default="", help="name of the base in PEFT's files (default: its path)"
    )
    checker = commands.add_parser("verify", help="check names, shapes, dtypes, values and hashes")
    checker.add_argument("path", type=Path)
    checker.add_argument("--base", type=Path, help="Hugging Face directory that the adapter must be for")
    return parser.parse_args()


def verify(path: Path, base: Path | None) -> None:
    """Print one line per finding, or one that says that there is none; raise if there is one."""
    found = findings(path, base)
    for folder, lines in found.items():
        for line in lines or ["ok"]:
            print(f"{folder}  {line}")
    wrong = sum(bool(lines) for lines in found.values())
    if wrong:
        kind = "adapters" if path in found else "steps"
        raise UserError(f"{wrong} of {len(found)} {kind} of {str(path)!r} are damaged or do not fit")


def run_export(arguments: argparse.Namespace) -> None:
    """Write the adapter in the format asked for."""
    source, out = arguments.workdir, arguments.out
    if arguments.base is not None:
        require_its_base(source, arguments.base)
    if arguments.format == "milora":
        export.export_milora(source, out)
    elif arguments.format == "orbax":
        export.export_orbax(source, out)
    else:
        export.export_peft(source, out, arguments.base_name or str(base_of(arguments)))
    print(f"written to {out}")


def base_of(arguments: argparse.Namespace) -> Path:
    """The directory of the base: as given, or the run's."""
    if arguments.base is not None:
        return arguments.base
    if not (arguments.workdir / CONFIG_NAME).is_file():
        raise UserError(f"{str(arguments.workdir)!r} is no workdir that names its base: give --base")
    return Path(read_workdir_config(arguments.workdir).model.path)


def main() -> None:
    """Parse the command line and run it."""
    arguments = parse_arguments()
    if arguments.command == "verify":
        verify(arguments.path, arguments.base)
    else:
        run_export(arguments)


if __name__ == "__main__":
    run_command(main)
