"""A chat assistant: chats in the base's own template, every answer learned, routed on the chat's first turn.

    python train.py --config configs/recipes/chat.py

Needs nothing but the package and two CPU cores. It writes what it reads into runs/inputs/chat: the embedded
model with a chat template, and chats of three stories, answered by more or less. Expect an exact match of
the frozen base near 0 %; docs/tuning.md has what a run printed.

For chats of your own, a base with a chat template:

    python train.py --config configs/recipes/chat.py --config.model.path=hf://OWNER/NAME \\
        --config.data.train=chats.jsonl --config.data.dev= --config.data.test= --config.data.max_length=2048

``--config.data.train_on=last`` learns the last answer of each chat alone.
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
from milora_jax.tiny.recipes import INPUTS, make_chats, write_chat_model, write_rows


def get_config():
    """The settings of the run."""
    folder = (INPUTS / "chat").resolve()
    splits = ("train", "dev", "test")
    files = {split: write_rows(folder / f"{split}.jsonl", make_chats(split)) for split in splits}
    config = Config(
        model=ModelSection(path=write_chat_model(folder / "model")),
        # One route for a whole conversation, so that its turns are one example and share a cache.
        adapter=AdapterSection(rank=16, route_on="first_turn"),
        data=DataSection(
            train=f"stories={files['train']}",
            dev=f"stories={files['dev']}",
            test=f"stories={files['test']}",
            template="chat",
            max_length=160,
        ),
        train=TrainSection(
            max_steps=40,
            batch_size=16,
            learning_rate=5e-3,
            coefficient_every=20,
            eval_every=20,
            save_every=20,
        ),
        eval=EvalSection(batch_size=48, max_new_tokens=4, limit=48),
    )
    return to_config_dict(config)
