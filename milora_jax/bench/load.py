"""``python -m milora_jax.bench load``: the speed of loading a base, compared with the disk itself.

The files are those of ``--path``, or are written first with random values: a published shape at reduced
depth. Each round reads all of them in order, in blocks of 16 MiB into one buffer; reads them so into fresh
memory of their size, as a program must that keeps them; and loads them. The page cache is emptied before
each, as far as the system allows one program to do so (``posix_fadvise``). One JSON object.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from milora_jax.base.hf import files_by_tensor
from milora_jax.base.known import SHAPES
from milora_jax.base.load import load_base
from milora_jax.bench import machine
from milora_jax.bench.files import write_random
from milora_jax.bench.rounds import BenchSettings, in_turns, option
from milora_jax.config import DTYPES, QUANTIZE
from milora_jax.errors import UserError

BLOCK = 2**24


@dataclass(frozen=True)
class Settings(BenchSettings):
    """The settings of ``bench load``.

    Attributes:
      path: Hugging Face directory; default: one is written.
      shape: shape of a written model.
      layers: layers of a written model.
      stored: dtype of a written file.
      shard_bytes: least size of a written file.
      scratch: directory of written files (default: the system's).
      dtype: dtype of the loaded base.
      quantize: quantisation of the loaded base.
      repeats: at least 5; the median counts.
    """

    path: str = ""
    shape: str = option("llama2-7b", choices=SHAPES)
    layers: int = option(3, least=1)
    stored: str = option("bfloat16", choices=DTYPES)
    shard_bytes: int = option(2**29, least=1)
    scratch: str = ""
    dtype: str = option("bfloat16", choices=DTYPES)
    quantize: str = option("none", choices=QUANTIZE)
    repeats: int = option(7, least=5)


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Measure, and yield the only report."""
    with tempfile.TemporaryDirectory(dir=settings.scratch or None) as scratch:
        directory = Path(settings.path or scratch)
        if not settings.path:
            config = dataclasses.replace(SHAPES[settings.shape], num_layers=settings.layers)
            write_random(directory, config, settings.stored, settings.shard_bytes)
        files = sorted({Path(file.name) for file in files_by_tensor(directory).values()})
        size = sum(path.stat().st_size for path in files)
        measured: dict[str, list[tuple[float, int]]] = {"keep": [], "load": []}
        work = {"keep": (_keep, files), "load": (_load, directory, settings.dtype, settings.quantize)}

        def take(name: str) -> None:
            _forget(files)
            measured[name].append(_in_fresh_process(*work[name]))

        disk_seconds = in_turns(list(work), settings.repeats, take, lambda: _read(files))
    keep_seconds, load_seconds = (
        statistics.median(seconds for seconds, _ in measured[name]) for name in work
    )
    peak = statistics.median(size for _, size in measured["load"])
    yield {
        "bench": "load",
        "bytes": size,
        "files": len(files),
        "stored": settings.stored if not settings.path else None,
        "dtype": settings.dtype,
        "quantize": settings.quantize,
        "repeats": settings.repeats,
        "disk_bytes_per_second": size / disk_seconds,
        "keep_bytes_per_second": size / keep_seconds,
        "load_bytes_per_second": size / load_seconds,
        "share_of_disk": disk_seconds / load_seconds,
        "share_of_keep": keep_seconds / load_seconds,
        "peak_bytes_over_file_bytes": peak / size,
        **machine.describe(),
    }


def _forget(files: list[Path]) -> None:
    """Ask the system to drop the files from its page cache."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # only pages that are on the disk are dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _read(files: list[Path]) -> float:
    """Seconds to read the files once, in order."""
    _forget(files)
    buffer = memoryview(bytearray(BLOCK))
    begin = time.perf_counter()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - begin


def _in_fresh_process(work: Callable[..., Any], *given: Any) -> tuple[float, int]:
    """Seconds of a function in a fresh process, and the most bytes that it added to the process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_measured, args=(theirs, work, *given))
    child.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise UserError("the process that loads ended before it had loaded") from None
    finally:
        child.join()


def _measured(pipe: Any, work: Callable[..., Any], *given: Any) -> None:
    jnp.zeros(1).block_until_ready()  # JAX itself takes memory and time
    before, begin = machine.peak_memory(), time.perf_counter()
    made = work(*given)
    seconds = time.perf_counter() - begin
    pipe.send((seconds, machine.peak_memory() - before))
    del made


def _load(directory: Path, dtype: str, quantize: str) -> Any:
    return load_base(directory, dtype, quantize=quantize)


def _keep(files: list[Path]) -> list[np.ndarray]:
    """Read the files into fresh memory."""
    contents = []
    for path in files:
        content = np.empty(path.stat().st_size, np.uint8)
        with open(path, "rb", buffering=0) as file:
            for start in range(0, len(content), BLOCK):
                part = content[start : start + BLOCK].data
                while part:
                    part = part[file.readinto(part) or 0 :]
        contents.append(content)
    return contents
