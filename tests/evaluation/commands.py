"""The study as a person starts it."""

import subprocess
import sys

from tests.paths import ROOT, environment


def start_study(*arguments, **pipes):
    """A process that is left to run."""
    command = [sys.executable, "-m", "milora_jax.evaluation", "study", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, **pipes)


def study_command(*arguments, timeout=120):
    """What became of a process that was waited for."""
    process = start_study(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        output = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, *output)
