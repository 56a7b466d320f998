"""Renders a chat template once before it is served, in a process with limits of time and memory.

Jinja's sandbox keeps a template from running code, and does not bound its time or memory.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from milora_jax.errors import UserError, printable

CPU_SECONDS, BYTES = 20, 4 * 2**30
"""Limits of the process, mostly for reading the tokenizer: a template itself takes a millisecond."""

WALL_FACTOR = 15
"""Wall time over CPU time: on a busy machine a process gets a small part of the time."""

TRIAL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds}))
resource.setrlimit(resource.RLIMIT_AS, ({size}, {size}))
from milora_jax.data.chat import Message, encode_chat, template_source
from milora_jax.data.tokens import load_tokenizer
from milora_jax.errors import UserError
tokenizer = load_tokenizer(sys.argv[1])
try:
    template_source(tokenizer)
except UserError:
    sys.exit(0)
try:
    encode_chat(tokenizer, [Message("user", "x")])
except UserError as error:
    sys.exit(str(error))
"""
"""The program of the process. A model without a template can be served, and refuses chats."""


def require_bounded_template(directory: Path) -> None:
    """Refuse a model whose chat template cannot write one message within limits of time and memory.

    Raises:
      UserError: with the error of the template, if it raised one.
    """
    program = TRIAL.format(seconds=CPU_SECONDS, size=BYTES)
    limits = f"{CPU_SECONDS} s and {BYTES // 2**30} GiB"
    try:
        trial = subprocess.run(
            [sys.executable, "-c", program, str(directory)],
            capture_output=True,
            text=True,
            timeout=WALL_FACTOR * CPU_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{str(directory)!r}: the chat template is not done within {limits}") from None
    if trial.returncode:
        lines = trial.stderr.strip().splitlines()
        why = (
            printable(lines[-1])[:300]
            if trial.returncode > 0 and lines
            else f"it is not done within {limits}"
        )
        raise UserError(f"{str(directory)!r}: the chat template is not to be served: {why}")
