"""Several real processes on this machine that run one command together, as on the hosts of a cluster."""

import re
import socket
import subprocess

from tests.paths import ROOT, environment

FEWEST_SECONDS = 300
"""Seconds that processes get: two cores compile for all of them."""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start_together(commands, log, devices):
    """A process for each command, which is told of the others.

    Args:
      log: folder of what they say, which is made.
      devices: of each process.
    """
    log.mkdir(exist_ok=True)
    where, processes = f"127.0.0.1:{free_port()}", []
    for i, command in enumerate(commands):
        cluster = (f"--coordinator={where}", f"--processes={len(commands)}", f"--process={i}")
        with (log / f"process{i}.txt").open("w") as file, (log / f"output{i}.txt").open("w") as output:
            processes.append(
                subprocess.Popen(
                    [*map(str, command), *cluster],
                    cwd=ROOT,
                    env=environment(devices),
                    stdout=output,
                    stderr=file,
                )
            )
    return processes


def said_by(log, count):
    """What each process wrote to standard error."""
    return [(log / f"process{i}.txt").read_text() for i in range(count)]


def ended(processes, seconds=FEWEST_SECONDS):
    """The exit code of every process; none is left running."""
    try:
        return [process.wait(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def ends(processes, log, seconds=FEWEST_SECONDS):
    """The exit code of every process, and what all of them wrote to standard error and output."""
    codes = ended(processes, seconds)
    return codes, "\n".join(path.read_text() for path in sorted(log.iterdir()))


def run_together(commands, log, devices, seconds=FEWEST_SECONDS):
    """What the first process printed, once all have ended well."""
    codes = ended(start_together(commands, log, devices), seconds)
    assert codes == [0] * len(commands), "\n".join(said_by(log, len(commands)))
    first, *others = (_without_gloo((log / f"output{i}.txt").read_text()) for i in range(len(commands)))
    assert not any(others), "only the first process prints"
    return first


def _without_gloo(text):
    """The text without what JAX's collectives on CPUs print, whose threads break each other's lines."""
    lines = text.splitlines(keepends=True)
    return "".join(
        line for line in lines if not re.search(r"\[Gloo\]|connected to \d+ peer|^\s*\d*\s*$", line)
    )
