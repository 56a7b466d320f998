"""The text of a domain, without instructions: continued pretraining.

    python train.py --config configs/recipes/plain_text.py

Needs nothing but the package and two CPU cores. It writes what it reads into runs/inputs/plain_text: texts of
six sums and their solutions each. The routers read the first 24 tokens of every example. Expect a dev
perplexity below 10; docs/tuning.md has what a run printed.

For texts of your own, rows ``{"text": "..."}``:

    python train.py --config configs/recipes/plain_text.py --config.model.path=hf://OWNER/NAME \\
        --config.data.train=texts.jsonl --config.data.dev= --config.data.max_length=2048 \\
        --config.data.prompt_tokens=256

Methods without a router learn all tokens but the first with ``--config.data.prompt_tokens=0``.
"""

from milora_jax.config import (
    AdapterSection,
    Config,
    DataSection,
    ModelSection,
    TrainSection,
    to_config_dict,
)
from milora_jax.tiny import MODEL_DIR
from milora_jax.tiny.recipes import INPUTS, make_texts, write_rows


def get_config():
    """The settings of the run."""
    folder = (INPUTS / "plain_text").resolve()
    config = Config(
        model=ModelSection(path=str(MODEL_DIR)),
        adapter=AdapterSection(rank=16),
        data=DataSection(
            train=write_rows(folder / "train.jsonl", make_texts("train")),
            dev=write_rows(folder / "dev.jsonl", make_texts("dev")),
            prompt_tokens=24,
            max_length=128,
            special_tokens="bos",
            pack=True,
        ),
        train=TrainSection(
            max_steps=40,
            batch_size=16,
            learning_rate=2e-3,
            coefficient_every=20,
            eval_every=20,
            save_every=20,
        ),
    )
    return to_config_dict(config)
