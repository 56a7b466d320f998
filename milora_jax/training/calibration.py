"""Statistics of standardized features, measured on training prompts on the frozen base before the first step.

The router's features of a prompt are standardized, in each dimension, by the mean and the deviation over
``train.feature_prompts`` training prompts. These are the first prompts that training would take, a pure
function of the seed. Every prompt's vector is copied to the host, where sums are taken in float64 in one
order, so that the statistics do not depend on the mesh or the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from milora_jax.adapters.hooks import Calibration
from milora_jax.adapters.router import floored
from milora_jax.base.attention import Attend
from milora_jax.base.modules import Base
from milora_jax.base.transformer import forward
from milora_jax.data.batches import batch_rows
from milora_jax.errors import UserError
from milora_jax.model_config import ModelConfig
from milora_jax.parallel.processes import to_host
from milora_jax.shapes import Array, Bool, Float
from milora_jax.training.prepare import Run
from milora_jax.types import Batch


@dataclass(frozen=True)
class FeatureStatistics:
    """Statistics of the pooled vectors of prompts, per layer and dimension."""

    mean: Float[np.ndarray, "L D"]
    deviation: Float[np.ndarray, "L D"]


class Features(NamedTuple):
    """The features of a batch's prompts, and whether each prompt exists."""

    pooled: Float[Array, "L B Z D"]
    present: Bool[Array, "B Z"]


def feature_program(
    model: ModelConfig, calibration: Calibration, attend: Attend
) -> Callable[[Base, Batch], Features]:
    """Compile the program that computes the features of a batch's prompts on the frozen base."""

    @jax.jit
    def features(base: Base, batch: Batch) -> Features:
        output = forward(base, model, batch, inspect=calibration.features, attend=attend)
        return Features(output.inspected, batch.present)

    return features


def feature_statistics(
    features: Callable[[Batch], Features],
    batches: Iterator[Batch],
    prompts: int,
) -> FeatureStatistics:
    """Mean and deviation over the first ``prompts`` prompts of some batches.

    Args:
      features: the program of :func:`feature_program` on a base.
      prompts: at least 2; where the batches hold fewer, all of them are used.

    Raises:
      UserError: a feature is not finite, or there are fewer than two prompts.
    """
    count, mean, squares = 0, np.zeros(()), np.zeros(())
    for batch in batches:
        pooled, present = to_host(features(batch))
        found = pooled[:, present][:, : prompts - count].astype(np.float64)
        if not np.isfinite(found).all():
            layer = int(np.flatnonzero(~np.isfinite(found).all(axis=(1, 2)))[0])
            raise UserError(
                f"the router's features are not finite on the frozen base, first in layer {layer}: "
                "use another model.dtype, or adapter.features=rms"
            )
        # Chan et al. 1983: sums of squares about each part's own mean, which do not cancel.
        new = found.shape[1]
        middle = found.mean(axis=1)
        step = middle - mean
        squares = (
            squares + ((found - middle[:, None]) ** 2).sum(axis=1) + step**2 * (count * new / (count + new))
        )
        mean = mean + step * (new / (count + new))
        count += new
        if count >= prompts:
            break
    if count < 2:
        raise UserError(
            "adapter.features=standardized measures features on training prompts: "
            f"expected at least 2, found {count}"
        )
    deviation = np.sqrt(squares / count).astype(np.float32)
    return FeatureStatistics(mean.astype(np.float32), np.asarray(floored(jnp.asarray(deviation))))


def measured_features(
    run: Run,
    calibration: Calibration,
    attend: Attend,
    log: Callable[[str], None],
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of the router's features, ``[L, D]`` each, over the first training prompts.

    Args:
      attend: the attention function.
      log: receives one line before the measurement begins.

    Raises:
      UserError: see :func:`feature_statistics`.
    """
    settings, count = run.config.train, len(run.train)

    def batches() -> Iterator[Batch]:
        for step in range(-(-count // settings.batch_size)):
            rows = batch_rows(settings.seed, step, count, settings.batch_size)
            yield run.batch(run.train, rows)

    wanted = min(settings.feature_prompts, len(run.train.examples) // run.train.answers)
    log(f"measuring the router's features on {wanted} training prompts")
    program = feature_program(run.model, calibration, attend)
    found = feature_statistics(lambda batch: program(run.base, batch), batches(), wanted)
    return found.mean, found.deviation
