"""Every row of the paper's tables that is a fine-tuned model: one method, one task, one base.

    python train.py --config configs/paper.py:milora,boolq --config.model.path=DIR
    python train.py --config configs/paper.py:lora,mixed --config.model.path=DIR --workdir runs/table2/lora
    python train.py --config configs/paper.py:milora-3,piqa --config.model.path=DIR
    python train.py --config configs/paper.py:moelora,boolq,gemma-2b --config.model.path=DIR

The words after the colon are a method (one of ``milora_jax.adapters.registry.METHODS``, or ``milora-1`` to
``milora-5``, the ablations of Table 5), a task (``boolq`` ``openbookqa`` ``ARC-Easy`` ``ARC-Challenge``
``piqa`` ``AQuA`` ``gsm8k``; ``mixed``, Table 2; ``alpaca``, Table 3) and, where it is not LLaMA-2 7B, a
base: ``llama2-13b`` or ``gemma-2b``. Without them it is ``milora,gsm8k``.

DIR is the Hugging Face directory of the base. Rows are expected at ``data/TASK/train.json`` and
``data/TASK/test.json``, as LLM-Adapters has them under ``dataset/``; GSM8K is the Hub's. Commands for
whole tables, files and their rows, hardware and the paper's figures stand in ``docs/reproduction.md``. None
of these runs has been made by us on the real weights.
"""

from typing import Any

from milora_jax.adapters.registry import METHODS
from milora_jax.config import (
    AdapterSection,
    Config,
    DataSection,
    EvalSection,
    MeshSection,
    ModelSection,
    TrainSection,
    to_config_dict,
)
from milora_jax.errors import UserError, one_of

PAIRS = {"rank": 32, "alpha": 0.0, "dropout": 0.0}
"""Of low-rank pairs: Eq. 1 has no scale."""

ROUTER = {
    "top_k": 3,
    "pooler": "attention",
    "activation": "rational",
    "features": "raw",  # H^l as it is, section 3.2; docs/method.md says what that does on published models
    "feature_window": 0.0,
    "gate": "straight_through",  # Eq. 3 has p itself, with which k = 7 would not be LoRA as section 3.2 says
    "router_gradient": "chosen",
    "top_k_anneal": 0.0,
    "balance": "loss",
    "load_balance": 1e-2,
    "balance_warmup": 0.0,
    "balance_until": 1.0,
    "balance_decay": 0.0,
    "bias_rate": 0.0,
    "coefficients": "bilevel",
}

SETTINGS: dict[str, dict[str, Any]] = {
    "milora": {**PAIRS, **ROUTER},
    "midora": {**PAIRS, **ROUTER},
    "lora": PAIRS,
    "dora": PAIRS,
    "adalora": {
        **PAIRS,
        "initial_rank": 64,
        "orthogonality": 0.5,
        "prune_start": 0.1,
        "prune_end": 0.7,
        "prune_every": 10,
        "sensitivity_decay": 0.85,
        "spread_decay": 0.85,
    },
    "moelora": {**PAIRS, "num_experts": 8, "top_k": 4},
    "ia3": {"width": 128},
    "bitfit": {"width": 64},
    "parallel_adapter": {"width": 160},
    "learned_adapter": {"width": 160, "coefficients": "bilevel"},
    "p_tuning_v2": {"width": 640, "tokens": 16},
    "iapt": {"width": 320, "tokens": 4, "coefficients": "bilevel"},
    "ssp": {**PAIRS, "coefficients": "bilevel", "search_share": 0.5, "gate_learning_rate": 0.1},
}
"""Appendix D, and every setting that it leaves open, written out, whatever the defaults become."""

ABLATIONS: dict[str, dict[str, Any]] = {
    "milora-1": {"pooler": "mean"},
    "milora-2": {"pooler": "last"},
    "milora-3": {"activation": "gelu"},
    "milora-4": {"activation": "relu-gelu"},
    "milora-5": {"activation": "gelu-relu"},
}
"""Table 5, under the paper's names: what differs from ``milora``."""

TRAINING_ROWS = {
    "boolq": 9427,
    "openbookqa": 4957,
    "ARC-Easy": 2251,
    "ARC-Challenge": 1119,
    "piqa": 16000,
    "AQuA": 97467,
    "gsm8k": 7473,
    "alpaca": 50000,
}
"""The paper's Table 6."""

MIXED = ("ARC-Easy", "ARC-Challenge", "boolq", "openbookqa", "piqa")
"""Table 2."""

REASONED = ("AQuA", "gsm8k")
"""Tasks whose answer comes after a rationale."""

BASES = ("llama2-7b", "llama2-13b", "gemma-2b")


def _files(task: str, split: str) -> str:
    if task == "gsm8k":
        return f"gsm8k=hf:openai/gsm8k:main:{split}"
    if task == "alpaca" and split == "test":
        return ""  # answers to it are judged, not matched (Table 3)
    return f"{task}=data/{task}/{split}.json"


def _settings(method: str) -> AdapterSection:
    """Of a method or of an ablation, every one of them written out."""
    if method in ABLATIONS:
        return AdapterSection(method="milora", **{**SETTINGS["milora"], **ABLATIONS[method]})
    return AdapterSection(method=method, **SETTINGS[method])


def get_config(row: str = "milora,gsm8k"):
    """The settings of one row: ``METHOD,TASK`` or ``METHOD,TASK,BASE``."""
    words = row.split(",")
    if len(words) not in (2, 3):
        raise UserError(f"--config paper.py:{row}: expected METHOD,TASK or METHOD,TASK,BASE")
    method, task, base = (*words, BASES[0])[:3]
    one_of("the method of --config paper.py", method, (*METHODS, *ABLATIONS))
    one_of("the task of --config paper.py", task, (*TRAINING_ROWS, "mixed"))
    one_of("the base of --config paper.py", base, BASES)
    tasks = MIXED if task == "mixed" else (task,)
    rows = sum(TRAINING_ROWS[each] for each in tasks)
    small = base == "gemma-2b"
    config = Config(
        model=ModelSection(dtype="bfloat16"),
        adapter=_settings(method),
        data=DataSection(
            train=",".join(_files(each, "train") for each in tasks),
            test=",".join(_files(each, "test") for each in tasks),
            max_length=768,
        ),
        mesh=MeshSection(data=-1, fsdp=1) if small else MeshSection(data=1, fsdp=-1),
        train=TrainSection(
            epochs=10,
            batch_size=16 if rows < 10_000 else 128,
            learning_rate=1e-4,
            coefficient_learning_rate=1e-6,
            coefficient_every=1,
            warmup_share=0.06,
            remat="full",
            loss_chunk=1024 if small else 4096,  # Gemma's vocabulary has 256,000 entries
            eval_every=200,
            save_every=200,
            patience=10,
        ),
        eval=EvalSection(batch_size=32, max_new_tokens=256 if task in REASONED else 32),
    )
    return to_config_dict(config)
