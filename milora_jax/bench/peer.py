"""Peers in processes of their own, which take turns with this package's variants."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import jax

from milora_jax.errors import UserError

PEERS = ("hf", "peft-lora", "peft-dora")
"""Hugging Face's models without an adapter, and with PEFT's adapters."""


class Peer:
    """A peer that has been started.

    Attributes:
      versions: versions of its packages.
      peak: most bytes used at the end of the last run, of the device or resident in its process.
    """

    def __init__(self, process: subprocess.Popen[str], errors: IO[str], method: str) -> None:
        self._process, self._errors, self._method = process, errors, method
        self.versions: dict[str, str] = json.loads(self._answer())
        self.peak = 0

    def run(self, count: int) -> None:
        """Continue the prompts by ``count`` tokens, or take ``count`` training steps, and wait."""
        stdin = self._process.stdin
        if stdin is None:
            raise AssertionError("the peer was started with a pipe")
        try:
            print(count, file=stdin, flush=True)
        except BrokenPipeError:
            raise self._failed() from None
        self.peak = int(self._answer())

    def _answer(self) -> str:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            raise self._failed()
        return line

    def _failed(self) -> UserError:
        self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines() or ["nothing was said"]
        return UserError(f"--method {self._method}: the peer ended with {said[-1]!r}; see --peer-python")


@contextmanager
def started(
    python: str, model: Path, method: str, what: str, sizes: Mapping[str, int | str]
) -> Iterator[Peer]:
    """Start a peer for the ``with`` block.

    Args:
      python: a Python with torch, transformers and peft.
      model: directory with ``config.json``, and with weights or without.
      what: "decode" or "train".
      sizes: values of the other options of ``peer_worker.py``.

    Raises:
      UserError: it does not start; the error has the last line of its output.
    """
    worker = Path(__file__).with_name("peer_worker.py")
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    command = [python, "-P", str(worker), "--what", what, "--model", str(model), "--method", method]
    command += ["--device", device]
    command += [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        except OSError as error:
            raise UserError(f"--peer-python {python!r}: {error.strerror}") from None
        try:
            yield Peer(process, errors, method)
        finally:
            process.kill()
            process.communicate()
