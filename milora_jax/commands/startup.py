"""What every command line does before it imports JAX."""

from __future__ import annotations

from milora_jax.commands import huge_pages, program_cache


def begin() -> None:
    """Prepare the process; only a program that was started as a command line calls this, and calls it first.

    The modules of a command take seconds to import, so ``train.py``, ``serve.py`` and the files
    ``PACKAGE/__main__.py`` call it above those imports.
    """
    huge_pages.restart()
    program_cache.keep_programs()
