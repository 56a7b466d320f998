"""Checks of the installed packages. This module imports none of them, because they may be what is broken."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Iterator, Mapping

from packaging.requirements import Requirement
from packaging.version import Version

import milora_jax
from milora_jax.config import TRACKERS, Config, tracker_names
from milora_jax.doctor.findings import FAIL, OK, WARN, Finding

DISTRIBUTION = "milora-jax"

PYTHONS = ((3, 11), (3, 14))
"""The oldest Python that is supported, and the first that is not."""

CORE = ("jax", "flax", "optax", "numpy", "safetensors")
"""Packages that everything needs."""

OF_TRAINING = ("orbax-checkpoint", "tensorstore", "transformers", "ml_collections", "matplotlib")
"""Packages that ``train.py`` needs as well, whatever the config."""

KNOWN_BAD = (("jax", "0.11.1", "flax", "0.12.8"),)
"""(package, from this version on, other package, up to this version): pairs that do not work together."""


def requirements() -> dict[str, Requirement]:
    """The packages that the installed milora-jax requires, by name, with those of ``train.trackers``.

    It is empty where milora-jax runs from a checkout that is not installed, and so has no metadata.
    """
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or ()
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {
        one.name: one
        for one in map(Requirement, lines)
        if one.marker is None or any(one.marker.evaluate({"extra": name}) for name in TRACKERS)
    }


def installed_versions(names: Iterable[str]) -> dict[str, str | None]:
    """The installed version of each package; None if it is missing."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def needed_by(config: Config | None) -> dict[str, str]:
    """The packages that a config needs, and the purpose of each."""
    if config is None:
        return dict.fromkeys(CORE, "everything")
    needed = {**dict.fromkeys(CORE, "everything"), **dict.fromkeys(OF_TRAINING, "training")}
    if config.data.template == "chat":
        needed["jinja2"] = "data.template=chat"
    sources = ",".join((config.data.train, config.data.dev, config.data.test)).split(",")
    if any(source.strip().startswith("hf:") or "=hf:" in source for source in sources):
        needed["datasets"] = "data sets of the Hub"
    for tracker in tracker_names(config.train.trackers):
        needed["tensorboardX" if tracker == "tensorboard" else tracker] = f"train.trackers={tracker}"
    if config.model.path.startswith("hf:"):
        needed["huggingface_hub"] = "models of the Hub"
    return needed


def version_findings(
    config: Config | None,
    required: Mapping[str, Requirement],
    installed: Mapping[str, str | None],
    python: tuple[int, int],
) -> Iterator[Finding]:
    """Check that Python and the packages are new enough, work together, and include those of the config.

    Args:
      required: see :func:`requirements`.
      installed: see :func:`installed_versions`; for all packages that are required or needed by the config.
      python: major and minor version.
    """
    good = True
    if not PYTHONS[0] <= python < PYTHONS[1]:
        good = False
        yield _failed(f"Python {python[0]}.{python[1]}: expected 3.11 to 3.13")
    if not required:
        good = False
        yield Finding(
            WARN,
            "versions",
            f"{DISTRIBUTION} is not installed, so nothing says which versions it requires: pip install -e .",
        )
    to_install = {name: f"{name}{one.specifier}" for name, one in required.items()}
    for name, purpose in needed_by(config).items():
        if installed.get(name) is None:
            good = False
            line = f"pip install '{to_install.get(name, name)}'"
            yield _failed(f"{name} is missing, which {purpose} needs: {line}")
    # A release candidate or a nightly build is compared as its release.
    releases = {name: Version(version).base_version for name, version in installed.items() if version}
    for name, one in required.items():
        if name in releases and releases[name] not in one.specifier:
            good = False
            yield _failed(f"{name} {installed[name]} is too old: pip install '{to_install[name]}'")
    for name, first, other, last in KNOWN_BAD:
        mine, theirs = releases.get(name), releases.get(other)
        if mine and theirs and Version(mine) >= Version(first) and Version(theirs) <= Version(last):
            good = False
            yield _failed(
                f"{name} {installed[name]} does not work with {other} {installed[other]}: "
                f"pip install '{name}<{first}', or a newer {other}"
            )
    if good:
        here = ", ".join(f"{name} {version}" for name, version in installed.items() if version)
        said = f"Python {platform.python_version()}, milora_jax {milora_jax.__version__}, {here}"
        yield Finding(OK, "versions", said)


def _failed(text: str) -> Finding:
    return Finding(FAIL, "versions", text)
