"""Classification to a label word: the answer is one of a few words, and is scored as such.

    python train.py --config configs/recipes/classification.py

Needs nothing but the package and two CPU cores. It writes what it reads into runs/inputs/classification:
stories on which the embedded model answers more or less. Expect an exact match of the frozen base near 0 %;
docs/tuning.md has what a run printed.

For a data set with a text and a label word in columns ``sentence`` and ``label_text``:

    python train.py --config configs/recipes/classification.py --config.model.path=hf://OWNER/NAME \\
        --config.data.train=train.jsonl --config.data.dev= --config.data.test=test.jsonl \\
        --config.data.columns='instruction="Is it positive or negative?",input=sentence,output=label_text'

Scoring by likelihood among the labels, without generation, is that of ``python -m milora_jax.evaluation``
(docs/evaluation.md).
"""

from milora_jax.config import (
    AdapterSection,
    Config,
    DataSection,
    EvalSection,
    ModelSection,
    TrainSection,
    to_config_dict,
)
from milora_jax.tiny import MODEL_DIR
from milora_jax.tiny.recipes import INPUTS, make_labels, write_rows


def get_config():
    """The settings of the run."""
    folder = (INPUTS / "classification").resolve()
    splits = ("train", "dev", "test")
    files = {split: write_rows(folder / f"{split}.jsonl", make_labels(split)) for split in splits}
    config = Config(
        model=ModelSection(path=str(MODEL_DIR)),
        adapter=AdapterSection(rank=16),
        data=DataSection(
            train=f"stories={files['train']}",
            dev=f"stories={files['dev']}",
            test=f"stories={files['test']}",
            max_length=128,
            # As in configs/tiny.py: the model's documents began with <s>.
            special_tokens="bos",
        ),
        train=TrainSection(
            max_steps=60,
            batch_size=16,
            learning_rate=5e-3,
            coefficient_every=20,
            eval_every=30,
            save_every=30,
        ),
        eval=EvalSection(batch_size=50, max_new_tokens=4, limit=50),
    )
    return to_config_dict(config)
