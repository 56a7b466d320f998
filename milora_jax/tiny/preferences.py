"""Preference pairs on the embedded model's sums, in TRL's schema: of two right answers the shorter one is
preferred."""

from __future__ import annotations

import json
from pathlib import Path

from milora_jax.tiny.tasks import make_task

PAIRS = {"train": 400, "dev": 40}
"""Number of pairs of each split."""

NAME = "preferences"


def make_preferences(seed: int) -> dict[str, list[dict[str, str]]]:
    """Make the pairs by split; no prompt is twice."""
    sums = make_task("arithmetic", seed)
    made = {}
    for split, count in PAIRS.items():
        unique = {row["instruction"]: row for row in sums[split]}
        made[split] = [
            {
                "prompt": row["instruction"],
                "chosen": f"The answer is {row['answer']}.",
                "rejected": row["output"],
            }
            for row in list(unique.values())[:count]
        ]
    return made


def write_preferences(directory: Path, seed: int) -> None:
    """Write ``preferences/{train,dev}.jsonl``."""
    (directory / NAME).mkdir(parents=True, exist_ok=True)
    for split, pairs in make_preferences(seed).items():
        lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
        (directory / NAME / f"{split}.jsonl").write_text(lines, encoding="utf-8")
