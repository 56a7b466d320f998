"""Every comparison of the paper on the embedded tiny model: thirteen methods, five tasks, equal budgets.

    python -m milora_jax.evaluation study all --config configs/study_tiny.py --seeds 5

Needs nothing but the package. On two CPU cores, one process on each, a little over two hours for everything
(docs/study.md); ``--quick`` rehearses it in minutes. The budget is LoRA's at rank 36, which MOELoRA as the
paper has it (8 experts of rank 4 per module) meets; every other method has the rank or width that comes
nearest.
"""

from typing import Any

from milora_jax.config import AdapterSection, Config, DataSection, EvalSection, ModelSection, TrainSection
from milora_jax.evaluation.study.settings import Study
from milora_jax.tiny import MODEL_DIR, TASKS, TASKS_DIR


def _files(split: str) -> str:
    return ",".join(f"{task}={TASKS_DIR / task / split}.jsonl" for task in TASKS)


METHODS: dict[str, dict[str, Any]] = {
    "parallel_adapter": {"width": 184},
    "learned_adapter": {"width": 184},
    "p_tuning_v2": {"width": 984},
    "iapt": {"width": 363},
    "bitfit": {"width": 67},
    "ia3": {"width": 147},
    "ssp": {"rank": 36},
    "lora": {"rank": 36},
    "adalora": {"rank": 36},
    "moelora": {"rank": 32},
    "dora": {"rank": 36},
    "milora": {"rank": 36},
    "midora": {"rank": 35},
}
"""In the order of the paper's Table 1."""


def get_study() -> Study:
    """The terms of the comparison."""
    base = Config(
        model=ModelSection(path=str(MODEL_DIR)),
        data=DataSection(
            train=_files("train"),
            dev=_files("dev"),
            test=_files("test"),
            max_length=160,
            # The model's documents began with <s>, which its tokenizer does not add by itself.
            special_tokens="bos",
        ),
        train=TrainSection(
            max_steps=60,
            epochs=1000,
            batch_size=8,
            # A step on Theta costs as much as one on Omega; the paper takes one after every step.
            coefficient_every=5,
            eval_every=30,
            save_every=1000,
            log_every=30,
        ),
        eval=EvalSection(batch_size=50, max_new_tokens=24),
    )
    return Study(
        base=base,
        methods={method: AdapterSection(method=method, **settings) for method, settings in METHODS.items()},
        learning_rates=(1e-3, 3e-3, 1e-2, 3e-2),
        # Its gates have the first half of training to be decided, and learn from dev batches alone.
        coefficient_every={"ssp": 1},
        mixed_steps=300,
        varied_tasks=("true_false", "multiple_choice"),
        ranks=(9, 18, 72),
        quick_tasks=("true_false", "word_order"),
    )
