"""Where a model lies: in a local directory, or on the Hugging Face Hub."""

from __future__ import annotations

import functools
from pathlib import Path

from milora_jax.errors import UserError

HUB = "hf://"

WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""Files that are fetched: no pickles, and no code."""


def model_directory(path: str | Path) -> Path:
    """The local directory of a model; one on the Hub is fetched into the Hub's cache first.

    Args:
      path: a directory, or ``hf://OWNER/NAME``, ``hf://OWNER/NAME@REVISION``. Runs and adapters keep a
        fingerprint of the files, so that they are refused where a name has come to mean other weights.

    Raises:
      UserError: for a name that is none, that the Hub does not have or does not give, or no connection to it.
    """
    text = str(path)
    return _fetched(text) if text.startswith("hf:") else Path(path)


@functools.cache
def _fetched(text: str) -> Path:
    """Once in a process: a name without a revision means one model for as long as it lives."""
    name, _, revision = text.removeprefix(HUB).partition("@")
    if not text.startswith(HUB) or name.count("/") != 1 or not all(name.split("/")):
        raise UserError(f"model {text!r}: expected {HUB}OWNER/NAME or {HUB}OWNER/NAME@REVISION")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError:
        raise UserError(f"model {text!r} needs the package huggingface_hub") from None
    try:
        found = snapshot_download(name, revision=revision or None, allow_patterns=list(WANTED))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"model {text!r} cannot be fetched: {reason[0] if reason else type(error).__name__}"
        ) from None
    return Path(str(found))
