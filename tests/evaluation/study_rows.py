"""The tiny study, and rows of a study by hand: as finished cells give them."""

import numpy as np

from milora_jax.evaluation.study.rows import ROUTED, RowScores
from milora_jax.evaluation.study.settings import load_study
from tests.paths import ROOT

STUDY = load_study(ROOT / "configs" / "study_tiny.py")
"""Loading it writes its rows, which takes a second."""


def scored(accuracy, loss):
    """Ten test rows of two tokens each, of which so many are right."""
    correct = (np.arange(10) < round(10 * accuracy)).astype(float)
    return RowScores(np.full(10, 2.0 * loss), np.full(10, 2.0), correct, correct)


def rows(values, trained_on=None, **more):
    """Rows from ``{variant: {task: accuracies by seed}}``."""
    return [
        {
            "variant": variant,
            "task": task,
            "trained_on": trained_on or task,
            "seed": seed,
            "accuracy": accuracy,
            "loss": 1.0 - accuracy / 2,
            "scores": {ROUTED: scored(accuracy, 1.0 - accuracy / 2)},
            "dev_perplexity": 2.0,
            "learning_rate": 1e-3,
            "tunable_parameters": 1000,
            "active_parameters": 400.0,
            "expert_share": np.full((3, 7), 3 / 7).tolist(),
            **more,
        }
        for variant, tasks in values.items()
        for task, accuracies in tasks.items()
        for seed, accuracy in enumerate(accuracies)
    ]
