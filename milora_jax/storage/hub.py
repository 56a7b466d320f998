"""Adapters on the Hugging Face Hub: fetched through its cache, and pushed in one commit.

An adapter has few files, with names that are known; nothing else of a repository is fetched: no pickles, no
code, and no weights of a model that was named by mistake.
"""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from milora_jax.addresses import HubAddress
from milora_jax.errors import TemporaryError, UserError

ADAPTER_FILES = (
    *("milora_config.json", "experts.safetensors", "router.safetensors", "manifest.json", "export.json"),
    *("adapter_config.json", "adapter_model.safetensors", "new_embeddings.*"),
    "*/adapter_config.json",  # of several adapters, so that they can be named
    *("best/*", "[0-9]*/*"),
)
"""Patterns of the names of an adapter's files: exports, what PEFT saves, and the steps of a checkpoint."""

CARD = "README.md"

LOGIN = "log in with 'hf auth login', or set HF_TOKEN"


def fetch_adapter(address: HubAddress, folder: Path) -> None:
    """Copy the files of an adapter into a folder; the Hub's cache keeps them.

    Args:
      folder: an empty directory.

    Raises:
      UserError: there is no such repository or revision, or no right to read it.
      TemporaryError: the Hub is out of reach, and its cache does not have the adapter.
    """
    within = f"{address.folder}/" if address.folder else ""
    with _failures(address, "fetched"):
        from huggingface_hub import snapshot_download

        found = Path(
            snapshot_download(
                address.repository,
                revision=address.revision or None,
                allow_patterns=[within + pattern for pattern in ADAPTER_FILES],
            )
        )
        # Copies, since files of the cache are symbolic links, which no reader of adapters follows.
        for path in sorted((found / address.folder).rglob("*")):
            name = path.relative_to(found / address.folder).as_posix()
            if path.is_file() and _is_of_adapter(name):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / name)


def push_adapter(folder: Path, address: HubAddress, card: str, private: bool) -> tuple[str, bool]:
    """Upload a folder to a repository in one commit; the repository is made where there is none.

    Files of an earlier adapter in the repository that this one does not have are deleted in the same commit.
    All others stay, among them a README.md that is there already.

    Args:
      folder: an adapter's directory, of which the files of :data:`ADAPTER_FILES` are uploaded.
      address: a repository, without a folder in it or a revision.
      card: the content of README.md where the repository has none.
      private: make a new repository private; one that exists keeps what it is.

    Returns:
      The address of the commit, and whether the card was uploaded.

    Raises:
      UserError: there is no right to write, or the Hub refuses the files.
      TemporaryError: the Hub is out of reach.
    """
    if address.folder or address.revision:
        raise UserError(f"{str(address)!r}: expected hf://OWNER/NAME to push to")
    with _failures(address, "pushed"):
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        api = HfApi()
        api.create_repo(address.repository, private=private or None, exist_ok=True)
        there = set(api.list_repo_files(address.repository))
        ours = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        ours = {name: path for name, path in ours.items() if _is_of_adapter(name)}
        operations: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in sorted(ours.items())]
        new_card = CARD not in there
        if new_card:
            operations.append(CommitOperationAdd(CARD, card.encode()))
        stale = [name for name in sorted(there - set(ours)) if _is_of_adapter(name)]
        operations += [CommitOperationDelete(name) for name in stale]
        done = api.create_commit(address.repository, operations, commit_message="Upload adapter")
    return str(done.commit_url), new_card


def _is_of_adapter(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in ADAPTER_FILES)


@contextmanager
def _failures(address: HubAddress, what: str) -> Iterator[None]:
    """Raise whatever keeps the Hub's library from its work as one line.

    Args:
      what: what the adapter cannot be.
    """
    try:
        of_transport = _of_transport()
    except ImportError:
        raise UserError(f"adapter {str(address)!r} needs the package huggingface_hub") from None
    try:
        yield
    except (*of_transport, OSError, ValueError, RuntimeError) as error:  # xet transfers raise the last
        raise _failure(address, what, error) from None


def _failure(address: HubAddress, what: str, error: BaseException) -> UserError:
    """The line for an error of the Hub's library."""
    from huggingface_hub import errors

    said = f"adapter {str(address)!r} cannot be {what}: "
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        # It is not in the cache either; the cause is why the Hub was not asked, or did not answer.
        error = error.__cause__
    if isinstance(error, errors.OfflineModeIsEnabled):
        return UserError(f"{said}HF_HUB_OFFLINE is set, and the Hub's cache does not have it")
    if isinstance(error, errors.GatedRepoError):
        return UserError(f"{said}its repository is gated; accept its terms on the Hub, and {LOGIN}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(f"{said}there is no such repository, or no right to see it; {LOGIN}")
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{said}its repository has no such revision")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return UserError(f"{said}no right to do that; {LOGIN}, with a token that may")
    text = str(error).strip().splitlines()
    reason = text[0] if text else type(error).__name__
    if status is None and isinstance(error, OSError | ValueError) and not _of_network(error):
        return UserError(f"{said}{getattr(error, 'strerror', None) or reason}")
    if status is not None and status < 500 and status != 429:
        return UserError(f"{said}{reason}")
    return TemporaryError(f"{said}the Hub is out of reach; {reason}")


def _of_transport() -> tuple[type[BaseException], ...]:
    """The base of all errors of the library that makes the requests: requests or httpx, by version."""
    from huggingface_hub.errors import HfHubHTTPError

    above = HfHubHTTPError.__mro__
    return (above[above.index(OSError) - 1],)


def _of_network(error: BaseException) -> bool:
    """Whether an error without an answer is the network's: a refusal of the file system has types of its
    own."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    of_network = (ConnectionError, TimeoutError, LocalEntryNotFoundError, *_of_transport())
    return isinstance(error, of_network)
