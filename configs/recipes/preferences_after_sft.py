"""Preference tuning after supervised tuning: DPO starts from, and is held to, the adapter of a first run.

    python train.py --config configs/recipes/preferences_after_sft.py:sft --workdir runs/sft
    python train.py --config configs/recipes/preferences_after_sft.py --workdir runs/preferences

Needs nothing but the package and two CPU cores. The first run learns sums with their solutions on the
embedded model, the second one prefers their calculation alone. ``train.init_from`` gives the second run its
start and, frozen and on its own route, its reference model. The settings of the method are the same in both.
docs/tuning.md has what the runs printed.
"""

from dataclasses import replace

from milora_jax.config import (
    AdapterSection,
    Config,
    DataSection,
    ModelSection,
    TrainSection,
    to_config_dict,
)
from milora_jax.errors import one_of
from milora_jax.tiny import MODEL_DIR, TASKS_DIR

STAGES = ("sft", "dpo")


def get_config(stage: str = "dpo"):
    """The settings of one of the two runs.

    Args:
      stage: one of STAGES, the word behind the colon of ``--config``.
    """
    one_of("the stage", stage, STAGES)
    rows = TASKS_DIR / ("arithmetic" if stage == "sft" else "preferences")
    course = TrainSection(batch_size=16, coefficient_every=20, eval_every=10, save_every=20)
    if stage == "sft":
        course = replace(course, max_steps=40, learning_rate=5e-3)
    else:
        course = replace(
            course, objective="dpo", beta=0.1, init_from="runs/sft", max_steps=20, learning_rate=5e-4
        )
    config = Config(
        model=ModelSection(path=str(MODEL_DIR)),
        adapter=AdapterSection(rank=16),
        data=DataSection(
            train=str(rows / "train.jsonl"),
            dev=str(rows / "dev.jsonl"),
            max_length=160,
            # As in configs/tiny.py: the model's documents began with <s>.
            special_tokens="bos",
        ),
        train=course,
    )
    return to_config_dict(config)
