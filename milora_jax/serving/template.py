"""A chat template tried before it is served: rendered once, in a process that may not take long or much.

Jinja's sandbox keeps a template from running code; nothing keeps it from counting to a billion.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from milora_jax.errors import UserError, printable

CPU_SECONDS, BYTES = 20, 4 * 2**30
"""Of the process, most of both for reading the tokenizer: a template itself takes a millisecond."""

PATIENCE = 15
"""Times CPU_SECONDS that are waited for: on a busy machine a process gets a small part of its time."""

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
"""A model without a template can be served, and refuses chats."""


def require_tame_template(directory: Path) -> None:
    """Refuse a model whose chat template cannot write one message within limits of time and memory.

    Raises:
      UserError: with what the template said, where it said anything.
    """
    program = TRIAL.format(seconds=CPU_SECONDS, size=BYTES)
    limits = f"{CPU_SECONDS} s and {BYTES // 2**30} GiB"
    try:
        trial = subprocess.run(
            [sys.executable, "-c", program, str(directory)],
            capture_output=True,
            text=True,
            timeout=PATIENCE * CPU_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{str(directory)!r}: the chat template is not done within {limits}") from None
    if trial.returncode:
        said = trial.stderr.strip().splitlines()
        why = (
            printable(said[-1])[:300] if trial.returncode > 0 and said else f"it is not done within {limits}"
        )
        raise UserError(f"{str(directory)!r}: the chat template is not to be served: {why}")
