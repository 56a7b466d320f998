"""LLaMA-3.2 1B on GSM8K: the paper's budget (sections 4.2 and 4.3), our router.

    python train.py --config configs/llama32_1b_math.py --config.model.path=DIR --workdir runs/llama3.2-1b

DIR is a Hugging Face directory of meta-llama/Llama-3.2-1B; the default data is the Hub's openai/gsm8k.
The base in bfloat16 takes 2.5 GB and lies whole on every device; the rows of a step are divided among
them. Everything else is set as in ``llama7b_math.py``. Whether a step fits your chips:

    python -m milora_jax.parallel aot --config configs/llama32_1b_math.py \
        --model llama3.2-1b --topology v5e:1x1

The paper has no GSM8K figure for this model, and this run has not been repeated by us on the real weights.
"""

from configs import llama7b_math


def get_config():
    """The settings of the run."""
    config = llama7b_math.get_config()
    config.mesh.data, config.mesh.fsdp = -1, 1
    config.train.loss_chunk = 1024  # of logits as wide as this vocabulary
    return config
