"""Check what a run has left on the disk, byte by byte.

python -m milora_jax.storage verify PATH    # a workdir, its checkpoints/ or best/, or one step
"""

from __future__ import annotations

import argparse
from pathlib import Path

from milora_jax.errors import UserError, run_command
from milora_jax.storage.checkpoint import CheckpointDirectory, verify_step
from milora_jax.storage.manifest import DamagedError


def step_folders(path: Path) -> list[Path]:
    """The steps at or below ``path``, in order."""
    roots = [path, path / "checkpoints", path / "best"]
    folders = [root / str(step) for root in roots for step in CheckpointDirectory(root, 1, print).steps()]
    return [path] if path.is_dir() and path.name.isdecimal() and not folders else folders


def verify(path: Path) -> None:
    """Print one line per step; raise if one of them is damaged or there is none."""
    folders = step_folders(path)
    if not folders:
        raise UserError(f"{str(path)!r} holds no steps: expected a workdir, checkpoints/, best/ or a step")
    damaged = 0
    for folder in folders:
        try:
            verify_step(folder)
        except DamagedError as error:
            damaged += 1
            print(f"{folder}  damaged: {error.file}: {error.reason}")
        else:
            print(f"{folder}  ok")
    if damaged:
        raise UserError(f"{damaged} of {len(folders)} steps of {str(path)!r} are damaged")


def main() -> None:
    """Parse the command line and run it."""
    parser = argparse.ArgumentParser(prog="python -m milora_jax.storage")
    commands = parser.add_subparsers(dest="command", required=True)
    checker = commands.add_parser("verify", help="check every file of every step against its manifest")
    checker.add_argument("path", type=Path)
    verify(parser.parse_args().path)


if __name__ == "__main__":
    run_command(main)
