"""The settings of the evaluation after training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from milora_jax.config.mesh import parse_mesh
from milora_jax.errors import require


@dataclass(frozen=True)
class EvalSection:
    """The evaluation after training.

    Attributes:
      limit: rows scored per task; 0 means all.
      batch_size: prompts decoded together.
      max_new_tokens: longest answer in tokens.
      mesh: mesh of the scoring, such as ``tensor=8``; empty is that of training, see docs/scaling.md.
      metric: a measure of your own beside the others, ``FILE.py:FUNCTION``; see docs/evaluation.md.
    """

    limit: int = 0
    batch_size: int = 32
    max_new_tokens: int = 64
    mesh: str = ""
    metric: str = ""

    def __post_init__(self) -> None:
        if self.mesh:
            parse_mesh(self.mesh, "eval.mesh")
        if self.metric:
            split_metric(self.metric)
        require(self.limit >= 0, "eval.limit", self.limit, "0 or more")
        require(self.batch_size >= 1, "eval.batch_size", self.batch_size, "at least 1")
        require(self.max_new_tokens >= 1, "eval.max_new_tokens", self.max_new_tokens, "at least 1")


def split_metric(text: str) -> tuple[Path, str]:
    """The file and the name of the function of an ``eval.metric``.

    Raises:
      UserError: it has another form.

    >>> split_metric("metrics/words.py:overlap")
    (PosixPath('metrics/words.py'), 'overlap')
    """
    path, _, name = text.rpartition(":")
    require(path.endswith(".py") and name.isidentifier(), "eval.metric", text, "FILE.py:FUNCTION")
    return Path(path), name
