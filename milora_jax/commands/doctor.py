"""``python -m milora_jax doctor``: one line per check, and an exit code that says whether any failed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from milora_jax.addresses import in_bucket
from milora_jax.commands.command_line import Parser
from milora_jax.commands.config_options import read_config_file
from milora_jax.doctor.examine import examine
from milora_jax.doctor.findings import FAIL
from milora_jax.errors import UserError, as_given


def workdir(text: str) -> Path:
    """The folder of a workdir; one in a bucket is fetched first."""
    if in_bucket(text) is None:
        return Path(text)
    # It imports JAX, which may be what is broken.
    from milora_jax.storage.mirror import with_states

    return with_states(text)


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the options; return them and the settings that replace the config's."""
    parser = Parser(
        allow_abbrev=False,
        prog="python -m milora_jax doctor",
        description="Check a machine, a config with its data, and a workdir: one line per check.",
    )
    parser.add_argument("--config", default="", help="a file such as configs/tiny.py")
    parser.add_argument(
        "--workdir", type=workdir, help="of train.py; without --config its own settings count"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--config.GROUP.FIELD", metavar="VALUE", help="as for train.py")
    asked, overrides = parser.parse_known_args(arguments)
    if overrides and not asked.config:
        raise UserError(f"command line: {overrides[0]!r} changes a --config, and none is given")
    return asked, overrides


def main(arguments: Sequence[str]) -> None:
    """Make every check and print its findings.

    Raises:
      UserError: a check has failed.
    """
    asked, overrides = parse_arguments(arguments)
    found = []
    read_config = (lambda: read_config_file(asked.config, overrides)) if asked.config else None
    for finding in examine(read_config, asked.workdir):
        found.append(finding)
        if not asked.json:
            print(as_given(finding.line()), flush=True)
    failed = sum(finding.level == FAIL for finding in found)
    if asked.json:
        report = {"ok": failed == 0, "findings": [finding.to_json() for finding in found]}
        print(as_given(json.dumps(report, ensure_ascii=False)))
    if failed:
        raise UserError(f"{failed} of {len(found)} findings are failures")
