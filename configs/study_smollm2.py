"""LoRA and MiLoRA, by the letter and as shipped, on SmolLM2-135M-Instruct: E2E alone, and four tasks mixed.

    python -m milora_jax.evaluation study converged --config configs/study_smollm2.py --seeds 3
    python -m milora_jax.evaluation study routing --config configs/study_smollm2.py --seeds 3

The model comes from the Hub, or from the directory that ``MILORA_MODEL`` names; the rows from the one that
``MILORA_DATA`` names, by default ``data``: ``e2e_cleaned/{train,test}.jsonl``, ``gsm8k/{train,test}.jsonl``
with the fields of the Hub, and ``llm_adapters/{ARC-Easy,boolq}/{train,test}.json``. The rows that are used
are drawn with a seed and written to ``runs/study_smollm2_rows``. Two CPU cores decide the terms: rows of at
most 520 characters, packed into rows of 256 tokens, some nine examples a step, and test rows scored by the
likelihood of their outputs, without generation; under routes other than their own, 100 of each task.
"""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

from milora_jax.config import AdapterSection, Config, DataSection, EvalSection, ModelSection, TrainSection
from milora_jax.errors import UserError
from milora_jax.evaluation.study.settings import LETTER, Budget, Converged, Study

MODEL = os.environ.get("MILORA_MODEL", "hf://HuggingFaceTB/SmolLM2-135M-Instruct")
DATA = Path(os.environ.get("MILORA_DATA", "data"))
ROWS_DIR = Path(__file__).resolve().parents[1] / "runs" / "study_smollm2_rows"
SEED = 2410

MAX_CHARACTERS = 520
DEV_ROWS = {"e2e": 24, "gsm8k": 8, "arc_easy": 8, "boolq": 8}
"""Every evaluation reads them: twice as many on the mix would cost as much as its training."""
TEST_ROWS = {"e2e": 1000, "gsm8k": 250, "arc_easy": 250, "boolq": 250}

Fields = dict[str, str]


def _plain(row: Fields) -> Fields:
    return {name: row[name] for name in ("instruction", "input", "output", "answer") if name in row}


def _gsm8k(row: Fields) -> Fields:
    return {
        "instruction": row["question"],
        "input": "",
        "output": row["answer"],
        "answer": row["answer"].rpartition("####")[2].strip(),
    }


FILES: dict[str, tuple[str, Callable[[Fields], Fields]]] = {
    "e2e": ("e2e_cleaned/{}.jsonl", _plain),
    "gsm8k": ("gsm8k/{}.jsonl", _gsm8k),
    "arc_easy": ("llm_adapters/ARC-Easy/{}.json", _plain),
    "boolq": ("llm_adapters/boolq/{}.json", _plain),
}


def _read(task: str, split: str) -> list[Fields]:
    """The rows of a file that are short enough."""
    name, fields = FILES[task]
    path = DATA / name.format(split)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"rows of {task}: {str(path)!r}: {error.strerror}; MILORA_DATA names the folder"
        ) from None
    rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    return [row for row in map(fields, rows) if sum(map(len, row.values())) <= MAX_CHARACTERS]


def _write_rows() -> None:
    """Draw the rows of each task; train and dev rows are parts of the file of training rows."""
    for task, tested in TEST_ROWS.items():
        held_out = DEV_ROWS[task]
        draw = random.Random(f"{SEED} {task}")
        train, test = _read(task, "train"), _read(task, "test")
        draw.shuffle(train)
        splits = {
            "train": train[held_out : held_out + 2000],
            "dev": train[:held_out],
            "test": draw.sample(test, min(tested, len(test))),
        }
        folder = ROWS_DIR / task
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            (folder / f"{split}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _files(split: str) -> str:
    return ",".join(f"{task}={ROWS_DIR / task / split}.json" for task in FILES)


def get_study() -> Study:
    """The terms of the comparison."""
    _write_rows()
    base = Config(
        model=ModelSection(path=MODEL),
        data=DataSection(
            train=_files("train"),
            dev=_files("dev"),
            test=_files("test"),
            template="chat",
            max_length=256,
            pack=True,
        ),
        train=TrainSection(
            max_steps=100, epochs=1000, batch_size=4, coefficient_every=10, eval_every=20, save_every=40
        ),
        eval=EvalSection(batch_size=16),
    )
    budget = Budget(max_steps=100, batch_size=4, eval_every=8)
    methods = ("lora", "milora_letter", "milora")
    return Study(
        base=base,
        methods={
            "lora": AdapterSection(method="lora", rank=16),
            "milora_letter": AdapterSection(method="milora", rank=16, **LETTER),
            "milora": AdapterSection(method="milora", rank=16),
        },
        generate=False,
        forced_rows=100,
        mixed_methods=methods,
        converged=Converged(
            methods=methods,
            single=budget,
            mixed=budget,
            learning_rates=(1e-3,),
            scales=(1.0,),
            alone=("e2e",),
        ),
    )
