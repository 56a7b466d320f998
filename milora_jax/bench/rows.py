"""``python -m milora_jax.bench rows``: what many training rows cost before the first step and in every step.

Descriptions of restaurants, as in the E2E data set, are written into a file, and short trainings begin on
it, each in a process of its own: with all rows in memory, with files that are made first
(``data.prepared_path``), and with those files. One JSON object per start. Seconds count from the start of the
process, so that imports, the base and the compilation of a step are in them; seconds of CPU time, of all
threads, tell what a shared machine hides.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import random
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milora_jax.bench import machine
from milora_jax.bench.rounds import BenchSettings, option
from milora_jax.config import Config
from milora_jax.training.loop import Trainer
from milora_jax.training.prepare import prepare_run

STARTS = ("memory", "made", "opened")


@dataclass(frozen=True)
class Settings(BenchSettings):
    """The settings of ``bench rows``.

    Attributes:
      model: Hugging Face directory with a tokenizer.
      into: folder for the file of rows, which is used again, the prepared rows and the workdirs.
      rows: number of rows.
      start: the starts to measure: rows in memory, files that are made, files that are there.
      batch: rows of a step.
      steps: steps of each training.
      packed: put several records into a row.
    """

    model: str
    into: Path
    rows: int = option(1_000_000, least=100)
    start: tuple[str, ...] = option(STARTS, choices=STARTS)
    batch: int = option(8, least=1)
    steps: int = option(50, least=4)
    packed: bool = False


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Start one training after the other and yield a report of each."""
    data = settings.into / f"{settings.rows}.jsonl"
    if not data.is_file():
        write_rows(data, settings.rows)
    prepared = settings.into / "prepared"
    for start in settings.start:
        if start == "made":
            shutil.rmtree(prepared, ignore_errors=True)
        workdir = settings.into / f"run-{start}"
        shutil.rmtree(workdir, ignore_errors=True)
        workdir.mkdir(parents=True)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            path = "" if start == "memory" else str(prepared)
            figures = alone.submit(train, settings, str(data), path, workdir, time.time()).result()
        yield {"what": "rows", **_plain(settings), "start": start, **figures, **machine.describe()}


def _plain(settings: Settings) -> dict[str, Any]:
    return {**dataclasses.asdict(settings), "into": str(settings.into)}


def train(settings: Settings, data: str, prepared: str, workdir: Path, launched: float) -> dict[str, Any]:
    """Train for a few steps in this process, and return the figures of its start and its steps.

    Args:
      prepared: see ``data.prepared_path``.
      launched: when the process was started, in seconds since the epoch.
    """
    config = Config.from_dict(
        {
            "model": {"path": settings.model},
            "data": {
                "train": data,
                "dev_limit": 8 * settings.batch,
                "max_length": 256,
                "pack": settings.packed,
                **({"prepared_path": prepared} if prepared else {}),
            },
            "train": {
                "max_steps": settings.steps,
                "batch_size": settings.batch,
                "eval_every": settings.steps,
                "save_every": settings.steps,
            },
            "adapter": {"rank": 8},
            "mesh": {"data": 1},
        }
    )
    run = prepare_run(config, workdir, lambda line: None)
    ready, ready_cpu, memory = time.time(), time.process_time(), machine.peak_memory()
    ends: list[float] = []
    cpu: list[float] = []

    def end_of_step(done: int, status: str) -> None:
        ends.append(time.time())
        cpu.append(time.process_time())

    fit = Trainer(run, workdir, lambda line: None).fit(end_of_step, lambda: False)
    # The last step evaluates and saves; the first one compiles.
    steady = (ends[-2] - ends[0]) / (settings.steps - 2)
    return {
        "ready_s": ready - launched,
        "ready_cpu_s": ready_cpu,
        "first_step_s": ends[0] - launched,
        "first_step_cpu_s": cpu[0],
        "ms_per_step": 1e3 * steady,
        "cpu_ms_per_step": 1e3 * (cpu[-2] - cpu[0]) / (settings.steps - 2),
        "tok_s": fit.progress.tokens / settings.steps / steady,
        "ready_peak_bytes": memory,
        "peak_memory_bytes": machine.peak_memory(),
    }


def write_rows(path: Path, count: int) -> None:
    """Write so many rows, the same ones every time."""
    rng = random.Random(0)
    names, foods = ("Alimentum", "Aromi", "Bibimbap House", "Blue Spice"), ("Chinese", "French", "Indian")
    areas, kinds = ("riverside", "city centre"), ("pub", "restaurant", "coffee shop")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    with partial.open("w", encoding="utf-8") as file:
        for number in range(count):
            name, food, area, kind = (rng.choice(each) for each in (names, foods, areas, kinds))
            text = f"{name} {number} is a {kind} in the {area}."
            given = f"name[{name} {number}], eatType[{kind}], area[{area}]"
            if rng.random() < 0.5:
                given, text = f"{given}, food[{food}]", f"{text} It serves {food} food."
            if rng.random() < 0.3:
                given, text = f"{given}, familyFriendly[yes]", f"{text} Children are welcome there."
            row = {"instruction": "Describe the place.", "input": given, "output": text}
            file.write(json.dumps(row) + "\n")
    partial.replace(path)
