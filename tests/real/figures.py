"""What the tests on a published model have measured, as lines of JSON and as the table of the docs.

python -m tests.real.figures FILE    # put the figures of FILE into docs/real_models.md
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from milora_jax.base.hf_config import read_model_config

PAGE = Path(__file__).resolve().parents[2] / "docs" / "real_models.md"
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"

PACKAGES = ("jax", "flax", "torch", "transformers", "peft", "lm_eval")


@dataclass(frozen=True)
class Figure:
    """One thing that was measured.

    Attributes:
      part: of the acceptance run.
      what: was measured, in words that a reader of the docs understands.
      value: a number, or a text.
      wanted: what the test demands of it; empty where it demands nothing.
    """

    part: str
    what: str
    value: float | str
    wanted: str = ""

    def to_json(self) -> str:
        """One line."""
        return json.dumps(vars(self))


def shown(value: float | str) -> str:
    """A value as the table has it.

    >>> [shown(value) for value in (0.000123456, 12.0, 1234567.0, "yes")]
    ['0.000123', '12', '1,234,567', 'yes']
    """
    if isinstance(value, str):
        return value
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:.3g}"


def setup(folder: Path) -> list[Figure]:
    """The model and the programs that the figures are of."""
    config = read_model_config(folder)
    stored = json.loads((folder / "config.json").read_text())
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    shape = f"{config.num_layers} layers of width {config.hidden_size}, vocabulary {config.vocab_size:,}"
    kept = stored.get("dtype", stored.get("torch_dtype", "an unknown dtype"))
    return [
        Figure("setup", "model", f"{stored['model_type']}, {shape}, stored in {kept}"),
        Figure("setup", "programs", f"Python {platform.python_version()}, {versions}"),
        Figure("setup", "processor cores", os.cpu_count() or 0),
    ]


def read_figures(lines: Iterable[str]) -> list[Figure]:
    """The figures of lines of JSON; of those that were measured several times, the last."""
    every = (Figure(**json.loads(line)) for line in lines if line.strip())
    return list({(figure.part, figure.what): figure for figure in every}.values())


def table(figures: Iterable[Figure]) -> str:
    """A Markdown table, part by part."""
    parts: dict[str, list[Figure]] = {}
    for figure in figures:
        parts.setdefault(figure.part, []).append(figure)
    lines = ["| part | figure | value | required |", "|---|---|---|---|"]
    for part, members in parts.items():
        lines += [f"| {part} | {each.what} | {shown(each.value)} | {each.wanted} |" for each in members]
    return "\n".join(lines)


def with_figures(page: str, figures: Iterable[Figure]) -> str:
    """The text of a page with its table made anew.

    Raises:
      ValueError: the page has no place for it.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} and {END} in the page")
    return f"{before}{BEGIN}\n{table(figures)}\n{END}{after}"


def main() -> None:
    """Read the file that the arguments name, and write the page."""
    figures = read_figures(Path(sys.argv[1]).read_text().splitlines())
    PAGE.write_text(with_figures(PAGE.read_text(), figures))


if __name__ == "__main__":
    main()
