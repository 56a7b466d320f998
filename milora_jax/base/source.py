"""Where a model is: in a local directory, on the Hugging Face Hub, or in Google Cloud Storage.

Readers always get a local directory. A model on the Hub is downloaded into the Hub's cache. Config and
tokenizer of a model in Cloud Storage are downloaded into a temporary directory of this process; its weights
stay there, and every process reads the ranges that its devices hold.
"""

from __future__ import annotations

import atexit
import fnmatch
import functools
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from milora_jax.addresses import require_local
from milora_jax.base.byte_files import ByteFile, LocalFile
from milora_jax.base.gcs import RemoteDirectory, RemoteFile
from milora_jax.errors import UserError, require

HUB = "hf://"

WEIGHTS = ".safetensors"

WANTED = ("*.json", "*.model", "*.txt", "*.jinja")
"""Files that are downloaded beside the weights: no pickles, and no code."""

_REMOTE: dict[Path, dict[str, RemoteFile]] = {}
"""The weight files of the temporary directories that this process made for models in Cloud Storage. The
content of a directory cannot add an entry: no model redirects its reader to another place."""


def model_directory(path: str | Path) -> Path:
    """The local directory of a model.

    Args:
      path: a directory; ``hf://OWNER/NAME`` or ``hf://OWNER/NAME@REVISION``; or ``gs://BUCKET/PATH``. Runs
        and adapters keep a fingerprint of the files, so that they are refused where a name has come to mean
        other weights.

    Raises:
      UserError: the name is malformed, or the model cannot be found or downloaded.
    """
    text = str(path)
    require(bool(text), "the path of a model", text, "a directory, hf://OWNER/NAME or gs://BUCKET/PATH")
    if text.startswith("hf:"):
        return _fetched(text)
    if text.startswith("gs:"):
        return _mirrored(text)
    require_local(text, "a directory, hf://OWNER/NAME or gs://BUCKET/PATH")
    return Path(path)


def weight_files(directory: Path) -> Mapping[str, ByteFile]:
    """The safetensors files of a model by name, local or remote.

    Args:
      directory: from :func:`model_directory`.
    """
    if directory in _REMOTE:
        return _REMOTE[directory]
    return {path.name: LocalFile(path) for path in sorted(directory.glob(f"*{WEIGHTS}"))}


def hub_name(path: str) -> str:
    """The name of a model for the libraries of Hugging Face: OWNER/NAME on the Hub, else the path.

    >>> hub_name("hf://meta-llama/Llama-3.2-1B@main"), hub_name("models/llama")
    ('meta-llama/Llama-3.2-1B', 'models/llama')
    """
    return path.removeprefix(HUB).partition("@")[0] if path.startswith(HUB) else path


@functools.cache
def _fetched(text: str) -> Path:
    """Cached, so that a name without a revision means one model for as long as the process lives."""
    name, _, revision = text.removeprefix(HUB).partition("@")
    if not text.startswith(HUB) or name.count("/") != 1 or not all(name.split("/")):
        raise UserError(f"model {text!r}: expected {HUB}OWNER/NAME or {HUB}OWNER/NAME@REVISION")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError:
        raise UserError(f"model {text!r} needs the package huggingface_hub") from None
    try:
        found = snapshot_download(name, revision=revision or None, allow_patterns=[*WANTED, f"*{WEIGHTS}"])
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"model {text!r} cannot be fetched: {reason[0] if reason else type(error).__name__}"
        ) from None
    return Path(str(found))


@functools.cache
def _mirrored(text: str) -> Path:
    """Cached, as for the Hub."""
    remote = RemoteDirectory(text)
    names = remote.names()
    directory = Path(tempfile.mkdtemp(prefix="milora_jax-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    for name in names:
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in WANTED):
            (directory / name).write_bytes(remote.content(name))
    _REMOTE[directory] = {name: remote.file(name) for name in names if name.endswith(WEIGHTS)}
    return directory
