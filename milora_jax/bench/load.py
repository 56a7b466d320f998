"""``python -m milora_jax.bench load``: how fast a base is read from a disk, beside the disk itself.

The files are those of ``--path``, or are written first with random values: a published shape at reduced
depth. Each round reads all of them once in order, in blocks of 16 MiB into one buffer; reads them so into
fresh memory of their size, as whoever keeps them must; and loads them; the page cache emptied before each as
far as the system lets one program do it (``posix_fadvise``). One JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from milora_jax.base.hf import files_by_tensor
from milora_jax.base.known import SHAPES
from milora_jax.base.load import load_base
from milora_jax.bench import machine
from milora_jax.bench.files import write_random
from milora_jax.bench.rounds import in_turns, require_least, require_names
from milora_jax.cli import Parser
from milora_jax.config import DTYPES, QUANTIZE
from milora_jax.errors import UserError

BLOCK = 2**24


def main(argv: list[str]) -> None:
    """Measure and print."""
    asked = _parse(argv)
    with tempfile.TemporaryDirectory(dir=asked.scratch or None) as scratch:
        directory = Path(asked.path or scratch)
        if not asked.path:
            config = dataclasses.replace(SHAPES[asked.shape], num_layers=asked.layers)
            write_random(directory, config, asked.stored, asked.shard_bytes)
        files = sorted({Path(file.name) for file in files_by_tensor(directory).values()})
        size = sum(path.stat().st_size for path in files)
        measured: dict[str, list[tuple[float, int]]] = {"keep": [], "load": []}
        work = {"keep": (_keep, files), "load": (_load, directory, asked.dtype, asked.quantize)}

        def measure(name: str) -> None:
            _forget(files)
            measured[name].append(_in_fresh_process(*work[name]))

        disk_seconds = in_turns(list(work), asked.repeats, measure, lambda: _read(files))
    keep_seconds, load_seconds = (
        statistics.median(seconds for seconds, _ in measured[name]) for name in work
    )
    peak = statistics.median(size for _, size in measured["load"])
    report = {
        "bench": "load",
        "bytes": size,
        "files": len(files),
        "stored": asked.stored if not asked.path else None,
        "dtype": asked.dtype,
        "quantize": asked.quantize,
        "repeats": asked.repeats,
        "disk_bytes_per_second": size / disk_seconds,
        "keep_bytes_per_second": size / keep_seconds,
        "load_bytes_per_second": size / load_seconds,
        "share_of_disk": disk_seconds / load_seconds,
        "share_of_keep": keep_seconds / load_seconds,
        "peak_bytes_over_file_bytes": peak / size,
        **machine.describe(),
    }
    print(json.dumps(report), flush=True)


def _forget(files: list[Path]) -> None:
    """Ask the system to drop the files from its page cache."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # a page that is not on the disk yet is not dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _read(files: list[Path]) -> float:
    """Seconds that it takes to read the files once, in order."""
    _forget(files)
    buffer = memoryview(bytearray(BLOCK))
    begin = time.perf_counter()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - begin


def _in_fresh_process(work: Callable[..., Any], *given: Any) -> tuple[float, int]:
    """Seconds of a piece of work, and bytes that it added to a process at most."""
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
    """The contents of the files, in memory that was not used before."""
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


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m milora_jax.bench load", description=__doc__)
    parser.add_argument("--path", default="", help="Hugging Face directory; default: one is written")
    parser.add_argument("--shape", default="llama2-7b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--layers", type=int, default=3, help="of a written model")
    parser.add_argument("--stored", default="bfloat16", choices=DTYPES, help="dtype of a written file")
    parser.add_argument("--shard-bytes", type=int, default=2**29, help="of a written file, at least")
    parser.add_argument("--scratch", default="", help="where files are written (default: the system's)")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of the loaded base")
    parser.add_argument("--quantize", default="none", choices=QUANTIZE, help="how the loaded base is kept")
    parser.add_argument("--repeats", type=int, default=7, help="at least 5; the median counts")
    asked = parser.parse_args(argv)
    require_least(asked, {"repeats": 5, "layers": 1, "shard_bytes": 1})
    require_names("--shape", [asked.shape], list(SHAPES))
    return asked
