"""Checks of the workdir: everything in it is as it was written, and it belongs to this run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

import numpy as np

from milora_jax.adapters.registry import build_method, full_settings
from milora_jax.config import Config
from milora_jax.doctor.findings import FAIL, OK, WARN, Finding, guarded
from milora_jax.doctor.subject import Subject
from milora_jax.errors import UserError
from milora_jax.storage.adapters import best_metadata, newest_step
from milora_jax.storage.verify import findings, step_folders
from milora_jax.training.health import blindness, remedy, saturation
from milora_jax.training.workdir import METRICS_NAME, differences


def workdir_findings(subject: Subject) -> Iterator[Finding]:
    """Check checkpoints and adapters byte by byte, their base, and the settings of the run."""
    workdir = subject.workdir
    if workdir is None:
        return
    if subject.kept is not None and subject.given is not None:
        yield settings_finding(subject.kept, subject.given)
    if not step_folders(workdir):
        said = f"{workdir} holds no checkpoint yet: python train.py begins at step 0"
        yield Finding(WARN, "checkpoints", said)
        return
    base = None
    try:
        base = subject.directory if subject.model else None
    except UserError:
        yield Finding(WARN, "checkpoints", "the base cannot be read: not compared with the steps")
    for folder, lines in findings(workdir, base).items():
        name = f"{folder.parent.name}/{folder.name}"
        if not lines:
            yield Finding(OK, "checkpoints", f"{name} verifies" + (", on this base" if base else ""))
        for line in lines:
            do = f"put a good copy back, or delete {folder}"
            yield Finding(FAIL, "checkpoints", f"{name}: {line}; {do}")
    yield from guarded("best", lambda: _best_findings(subject))
    yield from guarded("routers", lambda: _router_findings(subject))


def _best_findings(subject: Subject) -> Iterator[Finding]:
    """Report the adapter that evaluation, generation and exports use."""
    workdir = subject.workdir
    if workdir is None or not (workdir / "best").is_dir():
        yield Finding(
            WARN, "best", "no dev evaluation yet, so no adapter to evaluate, generate with or export"
        )
        return
    perplexity = best_metadata(workdir).get("dev_perplexity")
    step = newest_step(workdir)[1]
    yield Finding(OK, "best", f"the adapter of step {step}, dev perplexity {perplexity}")


def _router_findings(subject: Subject) -> Iterator[Finding]:
    """Report the routers by the last dev evaluation."""
    if subject.workdir is None or not (path := subject.workdir / METRICS_NAME).is_file():
        return
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]  # a kill may have torn the last line
    lines = [json.loads(line) for line in whole.splitlines()]
    seen = [line for line in lines if line.get("route_common")]
    if not seen:
        return
    last, settings = seen[-1], full_settings(build_method(subject.config.adapter))
    common, token_share = np.array(last["route_common"]), last.get("pooler_share")
    said = f"step {last['step']}: "
    if wrong := blindness(common) or saturation(None if token_share is None else np.array(token_share)):
        yield Finding(WARN, "routers", f"{said}{wrong}; {remedy(settings)}")
        return
    mean = f"{common.mean():.0%} of the dev prompts have a layer's commonest route, mean over layers"
    spread = f"features {np.mean(last['feature_spread']):.2f} times as spread as they were measured"
    measured = settings.features == "standardized"
    yield Finding(OK, "routers", said + (f"{mean}; {spread}" if measured else mean))


def settings_finding(kept: Config, given: Config) -> Finding:
    """Check that ``--config`` resumes the run of the workdir."""
    written = dataclasses.replace(given, adapter=full_settings(build_method(given.adapter)))
    found = [f"{name} is {old!r} there and {new!r} now" for name, old, new in differences(kept, written)]
    if found:
        said = "; ".join(found)
        return Finding(FAIL, "settings", f"the workdir holds another run: {said}; use another --workdir")
    return Finding(OK, "settings", "--config continues the run of the workdir")
