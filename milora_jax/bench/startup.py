"""``python -m milora_jax.bench startup``: seconds from a command to its first result, cold and warm.

Each start is a process of its own, as a person starts it. ``train`` ends with the first step, ``serve`` with
the server that is ready and then with the end of a first short answer, ``generate`` with its first token. A
cold start has an empty cache of compiled programs, and the warm ones that follow have what it left. One JSON
object per command, with medians. Seconds of CPU time, of all threads, tell what a shared machine hides.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milora_jax.bench import machine
from milora_jax.bench.rounds import BenchSettings, option
from milora_jax.bench.rows import write_rows
from milora_jax.errors import UserError, require
from milora_jax.training.workdir import METRICS_NAME

COMMANDS = ("train", "serve", "generate")
ROOT = Path(__file__).resolve().parents[2]
"""The checkout, which has ``train.py`` and ``serve.py``."""

LOOK_EVERY = 0.02
"""Seconds between two looks for a result."""

PROMPT = "Say hello."


@dataclass(frozen=True)
class Settings(BenchSettings):
    """The settings of ``bench startup``.

    Attributes:
      model: Hugging Face directory with a tokenizer.
      into: folder for rows, workdirs and caches; those of earlier measurements are removed.
      command: the commands to start.
      repeats: cold starts of each, and as many warm ones after them.
      adapter: a workdir or an exported adapter for ``serve`` and ``generate``; empty for the base alone.
      context: ``--context`` of the server.
      seconds: longest start.
    """

    model: str
    into: Path
    command: tuple[str, ...] = option(COMMANDS, choices=COMMANDS)
    repeats: int = option(5, least=1)
    adapter: str = ""
    context: int = option(2048, least=2)
    seconds: float = 600.0


@dataclass(frozen=True)
class Start:
    """One start: seconds to each result, by name, and the CPU seconds that the process took until its end."""

    seconds: dict[str, float]
    cpu: float


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Start every command cold and warm, and yield a report of each.

    Raises:
      UserError: a command ends before its result, or is too slow.
    """
    require((ROOT / "train.py").is_file(), "the package", str(ROOT), "a checkout with train.py and serve.py")
    folder = settings.into / "startup"
    write_rows(folder / "rows.jsonl", 400)
    for name in settings.command:
        starts: dict[str, list[Start]] = {"cold": [], "warm": []}
        for _ in range(settings.repeats):
            shutil.rmtree(folder / "cache", ignore_errors=True)
            for kind, found in starts.items():
                found.append(START_OF[name](settings, folder))
                if not (folder / "cache").is_dir():
                    raise UserError(f"{name}, {kind}: no compiled program was kept")
        cold, warm = map(_medians, starts.values())
        plain = {**dataclasses.asdict(settings), "into": str(settings.into), "start": name}
        del plain["command"]  # that of the benchmark stands at the end
        ratios = {what: warm[what] / cold[what] for what in cold}
        yield {"what": "startup", **plain, "cold": cold, "warm": warm, "ratio": ratios, **machine.describe()}


def _medians(starts: Sequence[Start]) -> dict[str, float]:
    names = starts[0].seconds
    found = {name: statistics.median(start.seconds[name] for start in starts) for name in names}
    return {**found, "cpu_s": statistics.median(start.cpu for start in starts)}


def _train(settings: Settings, folder: Path) -> Start:
    workdir = folder / "run"
    shutil.rmtree(workdir, ignore_errors=True)
    rows = folder / "rows.jsonl"
    config = {
        "model.path": settings.model,
        "data.train": rows,
        "data.dev": rows,
        "data.test": "",
        "data.dev_limit": 8,
        "data.max_length": 256,
        "train.batch_size": 8,
        "train.max_steps": 1,
        "train.log_every": 1,
        "train.eval_every": 1,
    }
    flags = [f"--config.{name}={value}" for name, value in config.items()]
    command = ["train.py", "--config", "configs/tiny.py", f"--workdir={workdir}", *flags]
    lines = workdir / METRICS_NAME

    def stepped() -> bool:
        return lines.is_file() and '"loss"' in lines.read_text()

    # Nothing is learned in a step, of which an exit code may tell.
    with _process(command, folder, ended=(0, 4)) as running:
        return running.until(settings, {"first_step_s": stepped})


def _serve(settings: Settings, folder: Path) -> Start:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    adapter = ["--adapter", f"mine={settings.adapter}"] if settings.adapter else []
    command = ["serve.py", "--base", settings.model, "--port", str(port), "--context", str(settings.context)]
    address = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        return _answer(f"{address}/health/ready") is not None

    def answered() -> bool:
        served = json.loads(_answer(f"{address}/v1/models") or b"{}")["data"]
        name = next(each["id"] for each in served if not settings.adapter or each["id"] == "mine")
        body = {"model": name, "prompt": PROMPT, "max_tokens": 1}
        return _answer(f"{address}/v1/completions", body) is not None

    with _process([*command, *adapter], folder, ended=(0, 143, -15)) as running:
        return running.until(settings, {"ready_s": ready, "first_answer_s": answered}, stop=True)


def _generate(settings: Settings, folder: Path) -> Start:
    adapter = ["--adapter", settings.adapter] if settings.adapter else []
    command = ["-m", "milora_jax.generation", "--base", settings.model, *adapter]
    with _process([*command, "--prompt", PROMPT, "--max-new-tokens", "1"], folder, ended=(0,)) as running:
        return running.until(settings, {"first_token_s": lambda: running.process.poll() is not None})


START_OF: dict[str, Callable[[Settings, Path], Start]] = {
    "train": _train,
    "serve": _serve,
    "generate": _generate,
}


def _answer(address: str, body: dict[str, Any] | None = None) -> bytes | None:
    """The body of a successful response; None otherwise."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.read()
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return None


@dataclass
class _Running:
    """A command that was started."""

    process: subprocess.Popen[bytes]
    began: float
    cpu_before: float
    log: Path
    ended: tuple[int, ...]

    def until(self, settings: Settings, results: dict[str, Callable[[], bool]], stop: bool = False) -> Start:
        """Wait for each result in turn, and for the end of the process.

        Args:
          results: whether there is each result yet, by name.
          stop: ask the process to end after the last one.
        """
        seconds = {}
        for name, there in results.items():
            while not there():
                if self.process.poll() is not None and not there():
                    raise UserError(f"the command ended before {name}: {self._last_line()}")
                if time.monotonic() - self.began > settings.seconds:
                    raise UserError(f"no {name} within --seconds {settings.seconds}: {self._last_line()}")
                time.sleep(LOOK_EVERY)
            seconds[name] = time.monotonic() - self.began
        if stop:
            self.process.terminate()
        code = self.process.wait(settings.seconds)
        if code not in self.ended:
            raise UserError(f"the command ended with {code}: {self._last_line()}")
        return Start(seconds, _cpu_of_children() - self.cpu_before)

    def _last_line(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it wrote nothing"


def _cpu_of_children() -> float:
    """CPU seconds of the children that have ended, of which there is one at a time."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextmanager
def _process(command: Sequence[str], folder: Path, ended: tuple[int, ...]) -> Iterator[_Running]:
    """Start a command of the package in the checkout, and end it with the ``with`` block."""
    kept = {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    without = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_MAX_SIZE")
    environment = {name: value for name, value in os.environ.items() if name not in without}
    log = folder / "log.txt"
    with log.open("wb") as file:
        began, cpu = time.monotonic(), _cpu_of_children()
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment | kept, stdout=file, stderr=file
        )
        try:
            yield _Running(process, began, cpu, log, ended)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
