"""DPO on the embedded tiny model: of two right answers to a sum, the shorter one is preferred.

    python train.py --config configs/recipes/preferences.py

Needs nothing but the package, two CPU cores and a few minutes. Expect `dev_rewards/accuracies` above 0.95
from the first evaluation on (docs/tuning.md has a run's lines). After supervised tuning, whose adapter is
then the reference model as well:

    python train.py --config configs/tiny.py --workdir runs/tiny
    python train.py --config configs/recipes/preferences.py --workdir runs/preferences \\
        --config.train.init_from=runs/tiny

`--config.train.objective=ipo` or `orpo` reads the same rows.
"""

from milora_jax.config import (
    AdapterSection,
    Config,
    DataSection,
    ModelSection,
    TrainSection,
    to_config_dict,
)
from milora_jax.tiny import MODEL_DIR, TASKS_DIR


def get_config():
    """The settings of the run."""
    config = Config(
        model=ModelSection(path=str(MODEL_DIR)),
        adapter=AdapterSection(rank=16),
        data=DataSection(
            train=str(TASKS_DIR / "preferences" / "train.jsonl"),
            dev=str(TASKS_DIR / "preferences" / "dev.jsonl"),
            max_length=160,
            # As in configs/tiny.py, so that its adapter can be the start.
            special_tokens="bos",
        ),
        train=TrainSection(
            objective="dpo",
            beta=0.1,
            max_steps=60,
            batch_size=16,  # pairs
            learning_rate=1e-3,
            coefficient_every=20,
            eval_every=20,
            save_every=20,
        ),
    )
    return to_config_dict(config)
