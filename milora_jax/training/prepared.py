"""Encoded rows in files, under ``data.prepared_path``: tokenised once, and opened by every later start.

A directory there is named by a SHA-256 over all that its tokens depend on, so a changed file, template or
setting has another one, and no old one is ever read for it. It appears with everything in it or not at all,
and is sealed by a manifest. What is damaged is made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from milora_jax.base.source import WANTED, WEIGHTS, model_directory
from milora_jax.config import Config
from milora_jax.console import LINE_EVERY
from milora_jax.data.chat import template_source
from milora_jax.data.rows import file_digest, hub_fingerprint, require_rows
from milora_jax.data.sources import Source
from milora_jax.data.stored import ANSWERS, INDEX, TOKENS, ExampleWriter, StoredExamples, writing
from milora_jax.data.tokens import Example
from milora_jax.errors import UserError
from milora_jax.model_config import ModelConfig
from milora_jax.storage.files import json_bytes, new_directory
from milora_jax.storage.manifest import DamagedError, read_verified, write_manifest

FORMAT = 2
"""Version of the files, and of what an example holds; another one has other directories."""

ABOUT, SPLITS = "about.json", ("train", "dev")

Make = Callable[[Mapping[str, Callable[[Example], Any]]], dict[str, Any]]
Found = tuple[dict[str, StoredExamples], dict[str, Any]]


def prepared_examples(
    sources: Mapping[str, Sequence[Source]],
    tokenizer: Any,
    config: Config,
    model: ModelConfig,
    make: Make,
    log: Callable[[str], None],
) -> Found:
    """The encoded training and dev rows of a config; they are made where they are not there yet.

    One of several processes makes them, and the others wait. Where the file system has no locks, each makes
    them, and the first to finish is read by all.

    Args:
      sources: of the training and the dev rows.
      make: gives every example to the function of its split, and returns JSON values that are stored as well.

    Returns:
      The examples by split, and the values of ``make``.

    Raises:
      UserError: a row cannot be encoded, or the directory cannot be written.
    """
    reads = _what_is_read(sources, tokenizer, config, model)
    key = hashlib.sha256(json_bytes(reads)).hexdigest()[:32]
    path = Path(config.data.prepared_path) / key
    names = sorted({source.name for each in sources.values() for source in each})
    if (found := _opened(path)) is not None:
        return found
    with _turn(path, log):
        if (found := _opened(path, log)) is not None:
            return found
        shutil.rmtree(path, ignore_errors=True)  # damaged
        try:
            with new_directory(path) as partial:
                log(f"preparing rows: {path} is made once, and read by later starts")
                with contextlib.ExitStack() as stack:
                    keep = {
                        split: _told(stack.enter_context(writing(partial, split, names)), split, log)
                        for split in SPLITS
                    }
                    about = make(keep)
                about = {"facts": about, "sources": names, "made_of": reads}
                (partial / ABOUT).write_bytes(json_bytes(about))
                if _what_is_read(sources, tokenizer, config, model) != reads:
                    raise UserError("the files of data.train or data.dev changed while they were read")
                write_manifest(partial)
        except UserError:
            if (found := _opened(path)) is not None:  # another process was faster
                return found
            raise
    if (found := _opened(path)) is None:
        raise UserError(f"{path}: removed as soon as it was made")
    return found


def _opened(path: Path, log: Callable[[str], None] | None = None) -> Found | None:
    """Open prepared rows; None where there are none, or where they are damaged, which is logged."""
    if not path.is_dir():
        return None
    small = [ABOUT, *(f"{split}{kind}" for split in SPLITS for kind in (INDEX, ANSWERS))]
    try:
        content = read_verified(path, [*small, *(f"{split}{TOKENS}" for split in SPLITS)], small)
        about = json.loads(content[ABOUT])
        examples = {
            split: StoredExamples(
                path / f"{split}{TOKENS}",
                content[f"{split}{INDEX}"],
                content[f"{split}{ANSWERS}"],
                about["sources"],
            )
            for split in SPLITS
        }
    except (DamagedError, OSError) as error:
        if log is not None:
            log(f"{error}: the rows are prepared again")
        return None
    return examples, about["facts"]


def _told(
    writer: ExampleWriter, split: str, log: Callable[[str], None], clock: Callable[[], float] = time.monotonic
) -> Callable[[Example], None]:
    """Append to a writer, and log how many there are now and then."""
    said = clock()

    def keep(example: Example) -> None:
        nonlocal said
        writer.append(example)
        if clock() - said >= LINE_EVERY:
            said = clock()
            log(f"preparing rows: {writer.count} {split}")

    return keep


def _what_is_read(
    sources: Mapping[str, Sequence[Source]], tokenizer: Any, config: Config, model: ModelConfig
) -> dict[str, Any]:
    """All that the examples depend on, as JSON values."""
    data, directory = config.data, model_directory(config.model.path)
    patterns = (*WANTED, "tokenizer*")
    files = {path.name: path for pattern in patterns for path in directory.glob(pattern) if path.is_file()}
    template = template_source(tokenizer) if data.template == "chat" else ""
    return {
        "format": FORMAT,
        "packages": {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers")},
        "sources": {
            split: [
                {
                    "name": source.name,
                    "columns": [dataclasses.asdict(column) for column in source.columns],
                    **({} if source.train_on == "all" else {"train_on": source.train_on}),
                    **_content(source.location),
                }
                for source in each
            ]
            for split, each in sources.items()
        },
        "tokenizer": {name: file_digest(path) for name, path in sorted(files.items()) if WEIGHTS not in name},
        "template": hashlib.sha256(template.encode()).hexdigest(),
        "prompt_format": dataclasses.asdict(config.prompt_format),
        "max_length": data.max_length,
        **({"prompt_tokens": data.prompt_tokens} if data.prompt_tokens else {}),
        "eos_ids": list(model.eos_ids),
        "vocab_size": model.vocab_size,
        "dev_limit": data.dev_limit,
        "objective": config.train.objective,
        # Which rows are held out; with a dev file these settings have no effect.
        "holdout": None if sources["dev"] else [data.dev_share, config.train.seed],
    }


def _content(location: str) -> dict[str, str]:
    """What the rows of a source depend on; the path of a file is none of it."""
    if location.startswith("hf:"):
        return {"location": location, "fingerprint": hub_fingerprint(location)}
    path = Path(location)
    require_rows(path)
    return {"suffix": path.suffix, "sha256": file_digest(path)}


@contextlib.contextmanager
def _turn(path: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of prepared rows for the ``with`` block, after others; the kernel frees that of a killed
    process. Without a right to write or locks there is none."""
    lock = path.with_name(f".{path.name}.lock")
    try:
        made = not path.parent.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        yield  # making the directory will say why
        return
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log(f"waiting for another process, which prepares the rows of {path}")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        # A process that waits for the deleted file finds the rows, or makes them beside another one.
        with contextlib.suppress(OSError):
            lock.unlink()
            if made:
                path.parent.rmdir()
        os.close(descriptor)
