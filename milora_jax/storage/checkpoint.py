"""The only module that knows Orbax: numbered checkpoints of a pytree, each sealed by a manifest.

Orbax writes the arrays. It neither checks their bytes when it reads them nor fsyncs all of its files, and it
reports a failed asynchronous save late. So a step is written under a hidden name, fsynced, sealed with
checksums and renamed into place last, and only manifests decide what is on disk.

A step ``ROOT/STEP/`` consists of ``tree/`` (Orbax, one named array per leaf), ``metadata.json`` (the caller's
values and the type of each leaf) and ``manifest.json``. All processes save and restore together, as Orbax
requires; only the first makes, seals, renames and deletes folders.

With a publisher each process has a root of its own, which Orbax does not allow, and every object counts:
the arrays are then one safetensors file in the place of ``tree/``.
"""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable, Container, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from milora_jax.base.json_files import read_json_object
from milora_jax.errors import UserError
from milora_jax.parallel.processes import is_first, place, several, wait_for_all
from milora_jax.storage.failpoints import reach
from milora_jax.storage.files import fsync_directory, json_bytes, write_atomic
from milora_jax.storage.leaves import (
    Leaf,
    copied,
    named_leaves,
    read_arrays,
    require_leaves,
    to_storage,
    write_arrays,
)
from milora_jax.storage.manifest import DamagedError, verify_manifest, write_manifest
from milora_jax.storage.orbax_errors import FAILURES, keep_quiet, reason_of
from milora_jax.types import PyTree

TREE = "tree"
ARRAYS = "arrays.safetensors"
METADATA = "metadata.json"
FORMAT = 1
"""Version of the layout of a step; a reader refuses any other."""

_HIDDEN = re.compile(r"\.(tmp|old|trash)-(0|[1-9][0-9]*)")
_STEP = re.compile(r"0|[1-9][0-9]*")


class Publisher(Protocol):
    """Keeps a copy of the steps elsewhere, see ``mirror.Mirror``."""

    def publish(self, step: Path) -> None:
        """Copy a step, which is complete."""
        ...

    def withdraw(self, step: Path) -> None:
        """Delete the copy of a step."""
        ...


class CheckpointDirectory:
    """The numbered checkpoints below ``root``.

    Reading needs nothing else. A writer must be the only one (``WorkdirLock``), and must call :meth:`poll`
    from time to time and :meth:`wait` before it ends: only then is a save on the disk.

    Args:
      root: directory of the steps; the first save makes it.
      keep: number of newest steps to keep, at least 1; None leaves deletion to :meth:`delete_except`.
      warn: receives one line for every damaged step that is skipped.
      publisher: copies every step; then each process has a root of its own, and writes whole steps into it.
    """

    def __init__(
        self, root: Path, keep: int | None, warn: Callable[[str], None], publisher: Publisher | None = None
    ) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"keep is {keep}: expected at least 1")
        self.root = Path(root).absolute()
        self._keep = keep
        self._warn = warn
        self._publisher = publisher
        self._ready_to_write = False
        self._pending: Future[None] | None = None

    def steps(self) -> list[int]:
        """Step numbers found on disk, ascending, damaged ones included."""
        if not self.root.is_dir():
            return []
        return sorted(int(p.name) for p in self.root.iterdir() if _STEP.fullmatch(p.name) and p.is_dir())

    def newest(self) -> int | None:
        """The newest step that verifies completely; newer ones that do not are named in warnings."""
        for step in reversed(self.steps()):
            try:
                verify_step(self.root / str(step))
            except DamagedError as error:
                self._warn(f"step {step} of {self.root} is damaged and ignored: {error.file}: {error.reason}")
            else:
                return step
        return None

    def save(self, step: int, tree: PyTree, metadata: dict[str, Any]) -> None:
        """Start saving ``tree`` as ``step``; a step that exists is replaced.

        Returns once the values are copied, after which the arrays may be donated or changed. Waits for an
        earlier save first.

        Args:
          step: 0 or more.
          tree: arrays of any dtype and sharding, typed PRNG keys among them.
          metadata: JSON values stored beside the arrays.

        Raises:
          UserError: this save cannot start, or an earlier one failed.
        """
        self.wait()
        keep_quiet()
        reach("before-save")
        described, arrays = to_storage(tree)
        leaves = {name: {"shape": d.shape, "dtype": d.dtype, "impl": d.impl} for name, d in described.items()}
        sealed = json_bytes({"format": FORMAT, "step": step, "leaves": leaves, "metadata": metadata})
        partial = self.root / f".tmp-{step}"
        with self._telling(step, partial):
            if self._writes():
                self._prepare_to_write()
                partial.mkdir()
            if self._publisher is None:
                write = _orbax_save(partial / TREE, arrays)
            else:
                write = functools.partial(write_arrays, partial / ARRAYS, copied(arrays))
        executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = executor.submit(self._commit, step, partial, sealed, write)
        executor.shutdown(wait=False)

    def delete_except(self, kept: Container[int]) -> None:
        """Delete every step but the ``kept`` ones. Waits for a running save first."""
        self.wait()
        surplus = [step for step in self.steps() if step not in kept]
        if surplus and self._writes():
            self._prepare_to_write()
            self._delete(surplus)

    def poll(self) -> None:
        """Raise the ``UserError`` of a save that has failed; every later call raises it too."""
        if self._pending is not None and self._pending.done():
            self._pending.result()

    def wait(self) -> None:
        """Block until no save is running, in any process; raise like :meth:`poll`."""
        if self._pending is not None:
            self._pending.result()
            if self._publisher is not None:
                wait_for_all("step published")

    def settle(self) -> None:
        """Block until no save is running, and ignore failures: for a run that has failed already.

        No save may be running when the process ends, because its threads could not start others then.
        """
        if self._pending is not None:
            self._pending.exception()

    def restore(self, step: int, abstract_tree: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """Read a step back, bit for bit, onto the given shardings.

        Args:
          step: one of :meth:`steps`.
          abstract_tree: ``jax.ShapeDtypeStruct`` leaves with a sharding each.

        Returns:
          The tree, and the metadata it was saved with.

        Raises:
          DamagedError: the step does not verify.
          UserError: it holds other leaves, shapes or dtypes; the error names the first difference.
        """
        directory = self.root / str(step)
        content = verify_step(directory)
        saved = {
            name: Leaf(tuple(leaf["shape"]), leaf["dtype"], leaf["impl"])
            for name, leaf in content["leaves"].items()
        }
        wanted = named_leaves(abstract_tree)
        require_leaves(directory, saved, wanted)
        stored = {
            name: jax.eval_shape(jax.random.key_data, leaf) if saved[name].impl else leaf
            for name, leaf in wanted.items()
        }
        asked = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=wanted[name].sharding)
            for name, leaf in stored.items()
            if leaf.size
        }
        try:
            if (directory / ARRAYS).is_file():
                loaded = read_arrays(directory / ARRAYS, asked)
            else:
                loaded = _orbax().load(directory / TREE, asked) if asked else {}
        except Exception as error:  # Orbax may raise anything for a tree that another program has sealed
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DamagedError(directory, TREE, f"cannot be read ({reason[:200]})") from error
        values = []
        for name, leaf in wanted.items():
            if name in loaded:
                value, impl = loaded[name], saved[name].impl
            else:
                data = jax.numpy.zeros(stored[name].shape, stored[name].dtype)
                value, impl = place(np.asarray(data), leaf.sharding), saved[name].impl
            values.append(jax.random.wrap_key_data(value, impl=impl) if impl else value)
        return jax.tree.unflatten(jax.tree.structure(abstract_tree), values), content["metadata"]

    def _writes(self) -> bool:
        """Whether this process makes, seals and deletes folders."""
        return self._publisher is not None or is_first()

    def _prepare_to_write(self) -> None:
        """Make the root, and delete what a killed run left under hidden names."""
        if self._ready_to_write:
            return
        self.root.mkdir(parents=True, exist_ok=True)
        for path in list(self.root.iterdir()):
            match = _HIDDEN.fullmatch(path.name)
            if not match:
                continue
            final = self.root / match[2]
            if match[1] == "old" and not final.exists():
                # A killed run was replacing the step: its former version is the only one.
                path.rename(final)
            else:
                shutil.rmtree(path)
        fsync_directory(self.root)
        fsync_directory(self.root.parent)
        self._ready_to_write = True

    def _commit(self, step: int, partial: Path, sealed: bytes, write: Callable[[], object]) -> None:
        """Make a step of the arrays that ``write`` writes; runs in a thread of its own.

        Processes other than the first only wait for the arrays.
        """
        with self._telling(step, partial):
            write()
            if not self._writes():
                return
            reach("tree-written")
            write_atomic(partial / METADATA, sealed)
            reach("metadata-written")
            reach("before-manifest")
            write_manifest(partial)
            reach("before-rename")
            self._put_in_place(partial, step)
            reach("after-rename")
            if self._publisher is not None:
                self._publisher.publish(self.root / str(step))
            self._delete_old(step)

    def _put_in_place(self, partial: Path, step: int) -> None:
        final, former = self.root / str(step), self.root / f".old-{step}"
        replaced = final.exists()
        if replaced:
            final.rename(former)
        partial.rename(final)
        fsync_directory(self.root)
        if replaced:
            shutil.rmtree(former)

    def _delete_old(self, saved: int) -> None:
        """Delete the steps before ``saved`` that exceed ``keep``.

        Later steps are left: the run that wrote them went back, and will reach them again.
        """
        if not (self.root / str(saved)).is_dir():
            raise FileNotFoundError(f"step {saved} vanished after it was saved")
        if self._keep is not None:
            former = [step for step in self.steps() if step <= saved]
            self._delete(former[: -self._keep])

    def _delete(self, steps: list[int]) -> None:
        for step in steps:
            if self._publisher is not None:
                self._publisher.withdraw(self.root / str(step))
            # Renamed first: a half-deleted step under its own name would look damaged.
            trash = self.root / f".trash-{step}"
            (self.root / str(step)).rename(trash)
            reach("during-delete")
            shutil.rmtree(trash)
        if steps:
            fsync_directory(self.root)

    @contextmanager
    def _telling(self, step: int, partial: Path) -> Iterator[None]:
        """Turn the errors of a save into a ``UserError``, and delete what it has written."""
        try:
            yield
        except FAILURES as error:
            if several() and isinstance(error, jax.errors.JaxRuntimeError):
                raise  # another process is gone, which is no failure of this save
            if self._writes() and partial.exists():
                # It may be what fills the disk. Renamed first, because Orbax's threads may still be writing.
                with suppress(OSError):
                    shutil.rmtree(partial.rename(self.root / f".trash-{step}"))
            raise UserError(f"cannot save step {step} to {self.root}: {reason_of(error)}") from error


def verify_step(directory: Path) -> dict[str, Any]:
    """Check a step folder byte by byte, and that its content is the step of its name.

    Returns:
      The content of its ``metadata.json``.

    Raises:
      DamagedError: something in it differs from what was written.
    """
    verify_manifest(directory)
    try:
        content = read_json_object(directory / METADATA)
    except UserError as error:
        raise DamagedError(directory, METADATA, str(error)) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DamagedError(directory, METADATA, f"not a checkpoint of format {FORMAT}")
    if str(content.get("step")) != directory.name:
        raise DamagedError(directory, METADATA, f"holds step {content.get('step')}, not {directory.name}")
    leaves = content.get("leaves")
    if not isinstance(leaves, dict) or not all(map(_is_described, leaves.values())):
        raise DamagedError(directory, METADATA, "leaves is no object with shape, dtype and impl of each")
    if not isinstance(content.get("metadata"), dict):
        raise DamagedError(directory, METADATA, "metadata is no object")
    return content


def _is_described(leaf: Any) -> bool:
    if not isinstance(leaf, dict) or leaf.keys() != {"shape", "dtype", "impl"}:
        return False
    shape, impl = leaf["shape"], leaf["impl"]
    return (
        isinstance(shape, list)
        and all(type(size) is int and size >= 0 for size in shape)
        and isinstance(leaf["dtype"], str)
        and (impl is None or isinstance(impl, str))
    )


def read_metadata(root: Path, step: int) -> dict[str, Any]:
    """Read the metadata of a verified step, without its arrays.

    Raises:
      UserError: there is no such step, or its metadata cannot be read.
    """
    content = read_json_object(root / str(step) / METADATA)
    if not isinstance(content.get("metadata"), dict):
        raise DamagedError(root / str(step), METADATA, "metadata is no object")
    return content["metadata"]


def _orbax() -> Any:
    """Orbax's v1 interface, which is imported by the first save or restore because that takes a second."""
    from orbax.checkpoint import v1

    return v1


def _orbax_save(path: Path, arrays: dict[str, jax.Array]) -> Callable[[], object]:
    """Start a save of all processes together; return what waits for its end."""
    wait_for_all("checkpoint folder")
    # Directories are made here: Orbax's threads would wait for minutes if that failed.
    context = _orbax().Context()
    context.async_options.create_directories_asynchronously = False
    with context:
        return _orbax().save_async(path, arrays).result
