"""``python -m milora_jax.bench device``: what a new accelerator should tell, in as many minutes as there are.

Most important first: whether every kernel equals its reference, the ceilings of memory and matrix products,
decoding at batch 1, 8, 32 and 128 with no, one and all different tenants, k of 3 and 7, three beams, prefill,
packed training, quantised bases, and PEFT where it is installed; each with its share of the ceilings.

Every row is written to ``--out`` as soon as it ends. A row is started if it is expected to fit into the time
that is left, and ended when the time is up. The same command goes on with what is missing; a row that failed
is kept with its error. ``--table`` prints what the file has as Markdown, and measures nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milora_jax.base.hf_config import read_model_config
from milora_jax.base.known import SHAPES
from milora_jax.bench.device_rows import ACCELERATOR, REHEARSAL, Prediction, Row, rows_of
from milora_jax.bench.device_table import as_markdown
from milora_jax.bench.rounds import BenchSettings, option
from milora_jax.errors import UserError, require
from milora_jax.model_config import ModelConfig
from milora_jax.storage.files import read_json, write_atomic

WORKER = "milora_jax.bench.device_worker"

ENDING = 3.0
"""Seconds that are kept for ending a worker and writing the file."""

PATIENCE = 4.0
"""A row is ended after so many times what it was expected to take, and not before ``LEAST_BOUND`` seconds."""

LEAST_BOUND = 60.0

SAME = ("device", "devices", "model", "dtype", "versions")
"""What all rows of a file have in common."""


@dataclass(frozen=True)
class Settings(BenchSettings):
    """The settings of ``bench device``.

    Attributes:
      minutes: within which the command ends.
      out: file of the results, which a second call goes on with.
      model: Hugging Face directory, or random: and a known shape; default: random:llama2-7b, and
        random:llama-30m on a CPU.
      dtype: of the base; default: bfloat16, and float32 on a CPU.
      peer_python: a Python with torch, transformers and peft; default: this one.
      again: measure rows again that failed.
      table: print the file as Markdown instead.
    """

    minutes: float = 5.0
    out: Path = Path("device.json")
    model: str = ""
    dtype: str = option("", choices=("", "float32", "bfloat16"))
    peer_python: str = sys.executable
    again: bool = False
    table: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.minutes > 0, "--minutes", self.minutes, "more than 0")


class Late(Exception):
    """A worker has not answered in time."""


class Worker:
    """A process that owns the device; see ``bench.device_worker``.

    Raises:
      Late: it does not say in time what the machine is.
      UserError: it ends before.
    """

    def __init__(self, settings: Settings, seconds: float) -> None:
        chosen = {name: getattr(settings, name) for name in ("model", "dtype", "peer_python")}
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", WORKER, json.dumps(chosen)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,  # so that its peers, which need memory of the device too, end with it
            env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ},
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.machine = self._answer(seconds)
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        if self._process.stdout is not None:
            for line in self._process.stdout:
                self._lines.put(line)
        self._lines.put("")

    def _answer(self, seconds: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=max(0.0, seconds))
        except queue.Empty:
            raise Late from None
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines() or ["nothing was said"]
            raise UserError(f"the process ended with code {code}: {said[-1][:300]}")
        return json.loads(line)

    def run(self, row: Row, seconds: float) -> dict[str, Any]:
        """Run a row.

        Raises:
          Late: it takes longer than ``seconds``.
          UserError: the process ended.
        """
        try:
            if self._process.stdin is not None:
                print(json.dumps(row.as_json()), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # the answer says how it ended
        return self._answer(seconds)

    def close(self) -> None:
        """End the process and all that it has started."""
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                pipe.close()


class Workers:
    """One worker at a time: a new one after one has ended."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._worker: Worker | None = None

    def machine(self, seconds: float) -> dict[str, Any]:
        """What a worker says of the machine.

        Raises:
          Late: it takes longer than ``seconds``.
          UserError: it ended.
        """
        self._worker = self._worker or Worker(self._settings, seconds)
        return self._worker.machine

    def answer(self, row: Row, seconds: float) -> dict[str, Any]:
        """The outcome of a row within ``seconds``: it is done, failed, or late."""
        begin = time.monotonic()
        try:
            self._worker = self._worker or Worker(self._settings, seconds)
            answer = self._worker.run(row, seconds - (time.monotonic() - begin))
            return {"status": "failed" if "error" in answer else "done", **answer}
        except Late:
            self.close()
            return {"status": "late", "seconds": seconds}
        except UserError as error:
            self.close()
            return {"status": "failed", "error": str(error), "seconds": time.monotonic() - begin}

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None


class Results:
    """The file of the results.

    Attributes:
      machine: what the rows were measured on; empty before the first.
      rows: by name.

    Raises:
      UserError: the file is another one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.machine: dict[str, Any] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            held = read_json(path)
            try:
                self.machine, self.rows = held["machine"], held["rows"]
            except (KeyError, TypeError):
                raise UserError(f"--out {path}: expected a file of this command") from None

    def claim(self, machine: Mapping[str, Any]) -> None:
        """Make sure that the rows so far are of this machine, and this model.

        Raises:
          UserError: they are not.
        """
        for name in SAME if self.machine else ():
            held, here = self.machine[name], machine[name]
            if held != here:
                raise UserError(f"--out {self._path} has results of {name} {held!r}, and this is {here!r}")
        self.machine = dict(machine)

    def write(self, row: Row, answer: Mapping[str, Any]) -> None:
        """Keep a row, in the order of measurement; the file is whole at any time."""
        self.rows[row.name] = {"kind": row.kind, "options": dict(row.options), **answer}
        text = json.dumps({"machine": self.machine, "rows": self.rows}, indent=1) + "\n"
        write_atomic(self._path, text.encode())


def measure(settings: Settings) -> Iterator[dict[str, Any] | str]:
    """Measure what fits into the time, and yield the outcome of each row; or yield the table."""
    results = Results(settings.out)
    if settings.table:
        if not results.rows:
            raise UserError(f"--out {settings.out}: no results are there yet")
        yield as_markdown(results.machine, results.rows)
        return
    end = time.monotonic() - seconds_since_start() + 60 * settings.minutes - ENDING
    workers = Workers(settings)
    try:
        try:
            machine = workers.machine(end - time.monotonic())
        except Late:
            raise UserError(f"--minutes {settings.minutes}: too few to start the device") from None
        results.claim(machine)
        config = _config_of(machine["model"])
        for row in rows_of(REHEARSAL if machine["backend"] == "cpu" else ACCELERATOR, machine["peers"]):
            held = results.rows.get(row.name, {}).get("status")
            if held == "done" or (held == "failed" and not settings.again):
                continue
            left, needed = end - time.monotonic(), _needed(row, config, results)
            if needed > left:
                yield {"row": row.name, "status": "no time", "expected_s": needed, "left_s": left}
                continue
            answer = workers.answer(row, min(left, max(PATIENCE * needed, LEAST_BOUND)))
            results.write(row, {**answer, "expected_s": needed})
            yield {"row": row.name, **results.rows[row.name]}
    finally:
        workers.close()


def seconds_since_start() -> float:
    """Seconds since this process was started: its imports count as well. 0 where Linux does not say it."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return 0.0


def _config_of(model: str) -> ModelConfig:
    known = SHAPES.get(model.removeprefix("random:"))
    return known if known is not None else read_model_config(Path(model))


def _needed(row: Row, config: ModelConfig, results: Results) -> float:
    """Seconds that a row is expected to take; more than what was too few for it before."""
    width = 2 if results.machine["dtype"] == "bfloat16" else 4
    done = [each for each in results.rows.values() if each["status"] == "done"]
    expected = Prediction(config, width, results.machine["backend"], done).seconds(row)
    held = results.rows.get(row.name, {})
    return max(expected, 1.5 * held["seconds"]) if held.get("status") == "late" else expected
