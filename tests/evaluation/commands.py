"""The study as a person starts it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    # One device, and machine code that is not worth optimising: see conftest.py.
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
}


def start_study(*arguments, **pipes):
    """A process that is left to run."""
    command = [sys.executable, "-m", "milora_jax.evaluation", "study", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, text=True, **pipes)


def study_command(*arguments, timeout=120):
    """What became of a process that was waited for."""
    process = start_study(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        output = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, *output)
