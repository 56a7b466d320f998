"""LLaMA-2 13B on GSM8K: the paper's budget (sections 4.2 and 4.3), our router.

    python train.py --config configs/llama13b_math.py --config.model.path=DIR --workdir runs/llama2-13b

DIR is a Hugging Face directory of meta-llama/Llama-2-13b-hf; the default data is the Hub's openai/gsm8k.
The base in bfloat16 takes 26.0 GB and is split over all devices, as in ``llama7b_math.py``, whose
settings these are. Whether a step fits your chips:

    python -m milora_jax.parallel aot --config configs/llama13b_math.py \
        --model llama2-13b --topology v5e:2x4

The paper has no GSM8K figure for this model, and this run has not been repeated by us on the real weights.
"""

from configs.llama7b_math import get_config

__all__ = ["get_config"]
