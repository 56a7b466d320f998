"""All checks, in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from milora_jax.doctor.base import base_findings, tokenizer_findings
from milora_jax.doctor.findings import FAIL, WARN, Finding, guarded
from milora_jax.doctor.machine import device_findings, memory_findings, mesh_findings
from milora_jax.doctor.routes import routing_findings
from milora_jax.doctor.rows import overlap_findings, row_findings, token_findings
from milora_jax.doctor.subject import Subject
from milora_jax.doctor.template import template_findings
from milora_jax.doctor.workdir import workdir_findings


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
      needs: checks that must succeed before this one.
    """

    name: str
    look: Callable[[Subject], Iterable[Finding]]
    needs: tuple[str, ...] = ()


CHECKS = (
    Check("base", base_findings),
    Check("mesh", mesh_findings, ("base",)),
    Check("memory", memory_findings, ("base", "mesh")),
    Check("tokenizer", tokenizer_findings, ("base",)),
    Check("template", template_findings, ("tokenizer",)),
    Check("rows", row_findings),
    Check("tokens", token_findings, ("tokenizer", "template", "rows")),
    Check("overlap", overlap_findings, ("tokenizer", "rows")),
    Check("workdir", workdir_findings),
    Check("routing", routing_findings, ("memory", "tokens")),
)


def look_at(subject: Subject, has_settings: bool) -> Iterator[Finding]:
    """Make every check whose requirements are met.

    Args:
      has_settings: whether the subject has settings; without them only the machine is checked.
    """
    yield from guarded("devices", device_findings)
    failed: set[str] = set()
    for check in CHECKS if has_settings else ():
        missing = [name for name in check.needs if name in failed]
        if missing:
            failed.add(check.name)
            yield Finding(WARN, check.name, f"not looked at: {', '.join(missing)} failed")
            continue
        for finding in guarded(check.name, lambda check=check: check.look(subject)):
            if finding.level == FAIL:
                failed.add(check.name)
            yield finding
