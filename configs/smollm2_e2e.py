"""SmolLM2-135M-Instruct on E2E, restaurant facts to sentences: a first real run, on a laptop.

    python train.py --config configs/smollm2_e2e.py --workdir runs/smollm2-e2e

The model (270 MB) and the rows come from the Hub. With local copies instead:

    python train.py --config configs/smollm2_e2e.py --config.model.path=DIR \
        --config.data.train=e2e/train.jsonl --config.data.dev=e2e/dev.jsonl \
        --config.data.test=e2e/test.jsonl --workdir runs/smollm2-e2e

Rows of local files have ``instruction``, ``input`` and ``output``, or the columns of the Hub; test rows may
list ``references``. On two CPU cores it takes some twenty minutes and 4 GiB of memory; a third of the time
goes into scoring 100 test rows before and after. docs/real_models.md shows what it prints.
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

INSTRUCTION = "Write one or two sentences about the restaurant that say all of these facts and nothing else."


def get_config():
    """The settings of the run."""
    config = Config(
        model=ModelSection(path="hf://HuggingFaceTB/SmolLM2-135M-Instruct"),
        adapter=AdapterSection(rank=16),
        data=DataSection(
            train="e2e=hf:tuetschek/e2e_nlg_cleaned::train",
            dev="e2e=hf:tuetschek/e2e_nlg_cleaned::validation",
            test="e2e=hf:tuetschek/e2e_nlg_cleaned::test",
            columns=f'instruction="{INSTRUCTION}",input=meaning_representation,references=human_reference',
            dev_limit=48,
            template="chat",
            max_length=192,
        ),
        train=TrainSection(
            max_steps=120,
            batch_size=8,
            learning_rate=1e-3,
            # A step on Theta costs as much as one on Omega; the paper takes one after every step.
            coefficient_every=20,
            eval_every=40,
            save_every=40,
        ),
        eval=EvalSection(limit=100, batch_size=20, max_new_tokens=64),
    )
    return to_config_dict(config)
