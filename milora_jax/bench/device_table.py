"""The results of ``bench device`` as Markdown, for ``docs/performance.md``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def as_markdown(machine: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A sentence about the machine and a table with a line for each row."""
    versions = machine["versions"]
    head = (
        f"{machine['devices']} x {machine['device']}, `{machine['model']}` in {machine['dtype']}, "
        f"jax {versions['jax']}, jaxlib {versions['jaxlib']}:"
    )
    lines = ["| | tokens/s | ms per step | share of the ceiling | seconds in all |", "|---|---|---|---|---|"]
    return "\n".join([head, "", *lines, *(_line(name, row) for name, row in rows.items())])


def _line(name: str, row: Mapping[str, Any]) -> str:
    seconds = _number(row.get("seconds"))
    if row["status"] == "late":
        return f"| {name} | was not done in time |  |  | {seconds} |"
    if row["status"] == "failed":
        said = str(row["error"]).replace("|", "\\|")
        return f"| {name} | failed: {said} |  |  | {seconds} |"
    report, cells = row["report"], ("", "", "")
    if row["kind"] == "checks":
        wrong = [each["check"] for each in report["checks"] if not each["ok"]]
        verdict = f"not equal: {'; '.join(wrong)}" if wrong else f"all {len(report['checks'])} equal"
        cells = (verdict, "", "")
    elif row["kind"] == "ceilings":
        cells = (f"{report['bandwidth'] / 1e9:.0f} GB/s, {report['matmul'] / 1e12:.2f} TFLOP/s", "", "")
    elif row["kind"] == "decode":
        share = report["roofline_share"]
        cells = (_number(report["decode_tok_s"]), _number(report["ms_per_step"]), _share(share))
    elif row["kind"] == "prefill":
        cells = (_number(report["tok_s"]), _number(report["prefill_ms"]), _share(report["matmul_share"]))
    else:
        cells = (_number(report["tok_s"]), _number(report["ms_per_step"]), _share(report["matmul_share"]))
    return f"| {name} | {' | '.join(cells)} | {seconds} |"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
