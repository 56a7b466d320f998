"""The settings of the optimiser and of the course of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from milora_jax.errors import one_of, require

TRACKERS = ("tensorboard", "wandb")
OBJECTIVES = ("sft", "dpo", "ipo", "orpo", "kto")
"""What the rows teach, by the names of TRL; see docs/tuning.md."""

REMAT = ("none", "products", "full")
"""What a backward pass computes again, from the least to the most; see :class:`TrainSection`."""

SCHEDULES = ("linear", "cosine", "constant", "wsd")
OPTIMIZERS = ("adamw", "adafactor")
BEST_BY = ("loss", "accuracy", "metric", "lowest_metric")
"""What decides the best step; see :class:`TrainSection`."""

BETA, DECAY_SHARE = 0.1, 0.2
"""Defaults of settings that only some objectives, or one schedule, read; elsewhere others are refused."""


@dataclass(frozen=True)
class TrainSection:
    """The optimiser and the schedule of a run, in optimiser steps.

    Attributes:
      objective: what the rows teach: sft, an answer; dpo, ipo and orpo, which of two answers is preferred;
        kto, whether an answer is desirable. See docs/tuning.md.
      beta: weight of a preference objective's reference model, or of orpo's odds ratio: beta of dpo and kto,
        tau of ipo, lambda of orpo.
      label_smoothing: share of the pairs of dpo whose preference is taken to be the wrong way round.
      max_steps: number of optimiser steps; 0 means as many as ``epochs`` gives.
      epochs: passes over the training rows; with ``max_steps`` too the run ends at the earlier of both.
      batch_size: rows of a step, over all devices together; a packed row holds several records.
      optimizer: adamw, two states of a parameter's size; adafactor, of each matrix the means over rows and
        columns alone.
      learning_rate: peak learning rate, reached after the warm-up.
      schedule: the learning rate after the warm-up: linear, a straight fall to 0; cosine, half a wave down
        to 0; constant, the peak; wsd, the peak and then a straight fall to 0 (warm-up, stable, decay).
      decay_share: share of all steps, the last ones, in which ``wsd`` falls.
      router_rate: learning rate of the routers' parameters as a multiple of ``learning_rate``.
      lora_plus_ratio: learning rate of the B matrices of low-rank pairs as a multiple of that of the A
        matrices, which is ``learning_rate`` (LoRA+); 0 or 1 is the same for both.
      router_clip_norm: largest norm of the routers' gradient, which is then clipped apart from that of the
        experts; 0 clips both together, by ``clip_norm``.
      feature_prompts: training prompts on which the statistics of standardized features are measured.
      coefficient_learning_rate: learning rate of the rational coefficients (paper: 1e-6).
      coefficient_every: steps between two bi-level updates of Theta, each on a dev batch (paper: 1). An
        update costs about as much as a step: 1 doubles the cost of training, 10 adds a tenth.
      warmup_share: share of all steps spent warming up.
      accumulate: parts into which a step's rows are divided and that are computed one after the other, which
        saves memory; the update is that of all rows together.
      remat: what the backward pass computes again instead of keeping it: none, nothing; products, all but
        the results of matrix products; full, every layer from its input. Attention's scores are never kept.
      loss_chunk: tokens of the batch whose logits are in memory at a time.
      weight_decay: decoupled weight decay.
      clip_norm: largest global gradient norm; 0 switches clipping off.
      neftune_alpha: size of the noise on the embeddings of training tokens (NEFTune): uniform up to
        ``alpha / sqrt(tokens of the example * width)``; 0 is none. Routers read the embeddings without it.
      eval_every: steps between two dev evaluations.
      save_every: steps between two checkpoints.
      log_every: steps between two lines of ``metrics.jsonl``.
      best_by: what decides on dev rows which step is the best, and whether the run stops early: loss, the
        lowest dev perplexity or loss of the objective; accuracy, the largest share of right answers; metric
        or lowest_metric, the largest or lowest value of ``eval.metric``. All but loss generate answers at
        every dev evaluation, to the first ``eval.limit`` rows of each file of ``data.dev``.
      patience: dev evaluations without improvement before the run stops early; 0 never stops.
      max_bad_steps: non-finite steps in a row that stop the run.
      seed: seed of initialisation, row order and dropout.
      trackers: where metrics go beside ``metrics.jsonl``: tensorboard, wandb, or both, comma-separated; see
        docs/logging.md.
      init_from: a workdir or an exported or imported adapter, of the same method and base, whose parameters
        training starts from, also at ``hf://OWNER/NAME``; empty starts from fresh ones.
    """

    objective: str = "sft"
    beta: float = BETA
    label_smoothing: float = 0.0
    max_steps: int = 0
    epochs: int = 10
    batch_size: int = 16
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    schedule: str = "linear"
    decay_share: float = DECAY_SHARE
    router_rate: float = 1.0
    lora_plus_ratio: float = 0.0
    router_clip_norm: float = 0.0
    feature_prompts: int = 256
    coefficient_learning_rate: float = 1e-6
    coefficient_every: int = 1
    warmup_share: float = 0.06
    accumulate: int = 1
    remat: str = "products"
    loss_chunk: int = 4096
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    neftune_alpha: float = 0.0
    eval_every: int = 200
    save_every: int = 200
    log_every: int = 10
    best_by: str = "loss"
    patience: int = 10
    max_bad_steps: int = 5
    seed: int = 0
    trackers: str = ""
    init_from: str = ""

    def __post_init__(self) -> None:
        counts = "epochs batch_size accumulate loss_chunk coefficient_every eval_every save_every log_every"
        for name in [*counts.split(), "max_bad_steps"]:
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        for name in "max_steps patience seed".split():
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 or more")
        one_of("train.remat", self.remat, REMAT)
        one_of("train.optimizer", self.optimizer, OPTIMIZERS)
        one_of("train.schedule", self.schedule, SCHEDULES)
        one_of("train.best_by", self.best_by, BEST_BY)
        self._check_objective()
        for name in tracker_names(self.trackers):
            one_of("train.trackers", name, TRACKERS)
        require(self.seed < 2**32, "train.seed", self.seed, "below 2**32")
        require(self.feature_prompts >= 2, "train.feature_prompts", self.feature_prompts, "at least 2")
        rates = "learning_rate router_rate lora_plus_ratio router_clip_norm coefficient_learning_rate"
        for name in [*rates.split(), "weight_decay", "clip_norm", "neftune_alpha"]:
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, f"train.{name}", value, "0 or more")
        require(0 <= self.warmup_share < 1, "train.warmup_share", self.warmup_share, "from 0 to below 1")
        require(0 < self.decay_share <= 1, "train.decay_share", self.decay_share, "above 0, up to 1")
        if self.schedule == "wsd":
            fits = self.warmup_share + self.decay_share <= 1
            require(fits, "train.decay_share", self.decay_share, "at most 1 - train.warmup_share")
        else:
            unset = self.decay_share == DECAY_SHARE
            require(unset, "train.decay_share", self.decay_share, "its default: only schedule 'wsd' reads it")

    def _check_objective(self) -> None:
        one_of("train.objective", self.objective, OBJECTIVES)
        scored = self.best_by == "loss" or not self.prefers
        require(
            scored, "train.best_by", self.best_by, f"'loss', the dev rows of {self.objective!r} are pairs"
        )
        require(math.isfinite(self.beta) and self.beta > 0, "train.beta", self.beta, "above 0")
        read = self.prefers or self.beta == BETA
        require(read, "train.beta", self.beta, "its default: objective 'sft' does not read it")
        smoothing, allowed = self.label_smoothing, "from 0 to below 0.5"
        require(0 <= smoothing < 0.5, "train.label_smoothing", smoothing, allowed)
        read = self.objective == "dpo" or smoothing == 0
        require(read, "train.label_smoothing", smoothing, f"0, objective {self.objective!r} has none")
        plain = not self.prefers or self.neftune_alpha == 0
        require(plain, "train.neftune_alpha", self.neftune_alpha, f"0 with objective {self.objective!r}")

    @property
    def prefers(self) -> bool:
        """Whether the objective is one of preference: every prompt has two answers in a row."""
        return self.objective != "sft"


def tracker_names(trackers: str) -> tuple[str, ...]:
    """The names in ``train.trackers``, each once.

    >>> tracker_names("wandb, tensorboard,wandb")
    ('wandb', 'tensorboard')
    """
    return tuple(dict.fromkeys(filter(None, (part.strip() for part in trackers.split(",")))))
