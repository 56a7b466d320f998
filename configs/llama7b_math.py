"""LLaMA-2 7B on GSM8K: the paper's budget (sections 4.2 and 4.3), our router.

    python train.py --config configs/llama7b_math.py --config.model.path=DIR \
        --config.data.train=gsm8k/train.jsonl --config.data.test=gsm8k/test.jsonl --workdir runs/math

DIR is a Hugging Face directory of meta-llama/Llama-2-7b-hf; the default data is the Hub's openai/gsm8k.
The base in bfloat16 takes 13.5 GB and the adapter's state 1 GB; both are split over all devices, unless
``--config.mesh`` says otherwise (docs/scaling.md). The paper reports 33.9 % on GSM8K with beam 3; decoding
here is greedy, and this run has not been repeated by us on the real weights.
"""

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


def get_config():
    """The settings of the run."""
    config = Config(
        model=ModelSection(dtype="bfloat16"),
        # The router has the defaults (docs/method.md); configs/paper.py has the paper's.
        adapter=AdapterSection(rank=32),
        data=DataSection(
            train="gsm8k=hf:openai/gsm8k:main:train",
            test="gsm8k=hf:openai/gsm8k:main:test",
            max_length=768,
        ),
        mesh=MeshSection(data=1, fsdp=-1),
        train=TrainSection(
            epochs=10,
            batch_size=16,  # the paper's choice below 10,000 training rows
            learning_rate=1e-4,
            coefficient_learning_rate=1e-6,
            coefficient_every=1,
            warmup_share=0.06,
            remat="full",  # 16 rows of 768 tokens on eight chips of 16 GB; "products" where memory allows
            eval_every=200,
            save_every=200,
            patience=10,
        ),
        eval=EvalSection(batch_size=32, max_new_tokens=256),
    )
    return to_config_dict(config)
