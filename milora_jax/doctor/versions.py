"""Which packages are here, and do they go together. Imports none of them: they may be what is broken."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Iterator, Mapping

import milora_jax
from milora_jax.config import Config, tracker_names
from milora_jax.doctor.findings import FAIL, OK, Finding

PYTHONS = ((3, 11), (3, 14))
"""The oldest Python that is supported, and the first that is not."""

FLOORS = {
    "jax": "0.10.2",
    "flax": "0.12.8",
    "optax": "0.2.5",
    "numpy": "2.0",
    "safetensors": "0.6",
    "orbax-checkpoint": "0.12.8",
    "tensorstore": "0.1.76",
    "transformers": "4.56",
    "huggingface_hub": "0.34",
    "jinja2": "3.1.6",
    "datasets": "4.0",
    "ml_collections": "1.1",
    "tqdm": "4.66",
    "matplotlib": "3.9",
    "sacrebleu": "2.5",
    "rouge-score": "0.1.2",
}
"""The oldest version of each package that we run with, as ``pyproject.toml`` says."""

TRACKER_FLOORS = {"tensorboardX": "2.6", "wandb": "0.19"}
"""The same of the packages of ``train.trackers``, which come with extras."""

CORE = ("jax", "flax", "optax", "numpy", "safetensors")
"""Nothing works without these."""

OF_TRAINING = ("orbax-checkpoint", "tensorstore", "transformers", "ml_collections", "matplotlib")
"""``train.py`` needs these as well, whatever the config says."""

KNOWN_BAD = (("jax", "0.11.1", "flax", "0.12.8"),)
"""(package, from this version on, other package, up to this version): pairs that do not work together."""


EVERY = FLOORS | TRACKER_FLOORS


def installed_versions() -> dict[str, str | None]:
    """The version of every package that we may need; None where it is missing."""
    found: dict[str, str | None] = {}
    for name in EVERY:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def needed_by(config: Config | None) -> dict[str, str]:
    """The packages that a config cannot do without, and what for."""
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


def numbers(version: str) -> tuple[int, ...]:
    """A version as numbers that can be compared.

    >>> numbers("0.11.1") > numbers("0.11"), numbers("2.9.0rc1")
    (True, (2, 9, 0))
    """
    release = re.match(r"[0-9.]*", version)
    return tuple(int(part) for part in (release[0] if release else "").split(".") if part)


def version_findings(
    config: Config | None,
    installed: Mapping[str, str | None],
    python: tuple[int, int],
) -> Iterator[Finding]:
    """Whether Python and the packages are new enough, go together, and are those that the config needs.

    Args:
      installed: see :func:`installed_versions`.
      python: major and minor version.
    """
    good = True
    if not PYTHONS[0] <= python < PYTHONS[1]:
        good = False
        yield _failed(f"Python {python[0]}.{python[1]}: expected 3.11 to 3.13")
    for name, purpose in needed_by(config).items():
        if installed.get(name) is None:
            good = False
            yield _failed(f"{name} is missing, which {purpose} needs: pip install '{name}>={EVERY[name]}'")
    for name, floor in EVERY.items():
        version = installed.get(name)
        if version is not None and numbers(version) < numbers(floor):
            good = False
            yield _failed(f"{name} {version} is too old: pip install '{name}>={floor}'")
    for name, first, other, last in KNOWN_BAD:
        mine, theirs = installed.get(name), installed.get(other)
        if mine and theirs and numbers(mine) >= numbers(first) and numbers(theirs) <= numbers(last):
            good = False
            yield _failed(
                f"{name} {mine} does not work with {other} {theirs}: "
                f"pip install '{name}<{first}', or a newer {other}"
            )
    if good:
        here = ", ".join(f"{name} {version}" for name, version in installed.items() if version)
        said = f"Python {platform.python_version()}, milora_jax {milora_jax.__version__}, {here}"
        yield Finding(OK, "versions", said)


def _failed(text: str) -> Finding:
    return Finding(FAIL, "versions", text)
