"""LLaMA-3.1 8B on GSM8K: the paper's budget (sections 4.2 and 4.3), our router.

    python train.py --config configs/llama31_8b_math.py --config.model.path=DIR --workdir runs/llama3.1-8b

DIR is a Hugging Face directory of meta-llama/Llama-3.1-8B; the default data is the Hub's openai/gsm8k.
The base in bfloat16 takes 16.1 GB and is split over all devices, as in ``llama7b_math.py``, whose
settings these are. Whether a step fits your chips:

    python -m milora_jax.parallel aot --config configs/llama31_8b_math.py \
        --model llama3.1-8b --topology v5e:2x4

The paper has no GSM8K figure for this model, and this run has not been repeated by us on the real weights.
"""

from configs.llama7b_math import get_config

__all__ = ["get_config"]
