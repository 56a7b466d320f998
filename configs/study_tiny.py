"""Every comparison of the paper on the embedded tiny model: fourteen methods, five tasks, equal budgets.

    python -m milora_jax.evaluation study all --config configs/study_tiny.py --seeds 10

Needs nothing but the package; docs/study.md says how long it takes. ``--quick`` rehearses it in minutes. The
tasks are the harder versions of the embedded ones (``milora_jax.tiny.harder``), with 500 test rows each: on
the embedded ones several methods make no mistake. Their rows are a pure function of a seed and are written
to ``runs/study_tiny_rows``. The budget is LoRA's at rank 36, which MOELoRA as the paper has it (8 experts of
rank 4 per module) meets; every other method has the rank or width that comes nearest.
"""

from pathlib import Path
from typing import Any

from milora_jax.config import AdapterSection, Config, DataSection, EvalSection, ModelSection, TrainSection
from milora_jax.evaluation.study.settings import LETTER, Budget, Converged, Study
from milora_jax.tiny import MODEL_DIR, TASKS, harder
from milora_jax.tiny.tasks import write_tasks

ROWS_DIR = Path(__file__).resolve().parents[1] / "runs" / "study_tiny_rows"
ROWS_SEED = 2410


def _files(split: str) -> str:
    return ",".join(f"{task}={ROWS_DIR / task / split}.jsonl" for task in TASKS)


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
    "moelora": {"rank": 32, "num_experts": 8},
    "dora": {"rank": 36},
    "milora_letter": {"method": "milora", "rank": 36, **LETTER},
    "milora": {"rank": 36},
    "midora": {"rank": 35},
}
"""In the order of the paper's Table 1; what is named otherwise than its method says which it is. All else is
at the defaults, which ``study.json`` stores."""


def get_study() -> Study:
    """The terms of the comparison."""
    write_tasks(ROWS_DIR, ROWS_SEED, harder.ROWS, harder.MAKERS)
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
            save_every=250,
            log_every=30,
        ),
        eval=EvalSection(batch_size=50, max_new_tokens=32),
    )
    return Study(
        base=base,
        methods={
            label: AdapterSection(**{"method": label, **settings}) for label, settings in METHODS.items()
        },
        learning_rates=(1e-3, 3e-3, 1e-2, 3e-2),
        converged=Converged(
            methods=("lora", "dora", "moelora", "milora_letter", "milora"),
            single=Budget(max_steps=300, batch_size=16, eval_every=20),
            mixed=Budget(max_steps=1000, batch_size=16, eval_every=50),
            learning_rates=(1.5e-3, 3e-3, 6e-3),
            scales=(1.0, 2.0),
            tuned_on=("multiple_choice", "word_order"),
        ),
        # Its gates have the first half of training to be decided, and learn from dev batches alone.
        coefficient_every={"ssp": 1},
        mixed_steps=300,
        mixed_methods=("lora", "dora", "moelora", "milora_letter", "milora"),
        varied_tasks=("multiple_choice", "word_order"),
        ranks=(9, 18, 72),
        choices={
            "load balance 0.01": {"load_balance": 1e-2},
            "balance by a bias": {"balance": "bias"},
            "features rms": {"features": "rms"},
            "features raw": {"features": "raw"},
            "statistics of the frozen base": {"feature_window": 0.0},
            "gate renormalized": {"gate": "renormalized"},
            "gate softmax": {"gate": "softmax"},
            "gradient of the chosen experts": {"router_gradient": "chosen"},
            "k not annealed": {"top_k_anneal": 0.0},
            "k annealed over 80 %": {"top_k_anneal": 0.8},
        },
        quick_tasks=("true_false", "word_order"),
    )
